"""Outcomes: replay from a cursor, then live, as server-sent events or page by page."""

from __future__ import annotations

import asyncio
import time

import structlog
from aiohttp import web

from infra.errors import ImageSearchError, StoreUnavailable
from query_service.endpoint import JSON, Endpoint, parse, query_of
from query_service.event_feed import Feed, FeedFilter, FeedMessage, FeedPage, next_page
from query_service.keys import FEED, KEY_RING, SETTINGS, STOPPING
from query_service.middlewares import EVENTS_PATH
from query_service.request import API_KEY, grant_of, limit_of
from query_service.streaming import ReaderGone, break_off, is_gone, send
from schemas.access import Scope
from schemas.api import ErrorCode, EventPage, EventParameters

LAST_EVENT_ID_HEADER = "Last-Event-ID"
MEDIA_TYPE = "text/event-stream"
RECONNECT_MS = 2000
_WRITE_BYTES = 64 * 1024

log = structlog.get_logger(__name__)


async def events(request: web.Request) -> web.StreamResponse:
    parameters = parse(EventParameters, query_of(request))
    # A browser that reconnects repeats its first URL: what it has seen since stands in the header.
    cursor = request.headers.get(LAST_EVENT_ID_HEADER) or parameters.cursor
    wanted = FeedFilter(parameters.type, parameters.narrow, grant_of(request))
    if parameters.wait is not None or _asks_for_json(request):
        return await _page(request, parameters, cursor, wanted)
    async with request.app[FEED].open(cursor, wanted, follow=parameters.follow) as feed:
        response = web.StreamResponse(
            headers={
                "Content-Type": f"{MEDIA_TYPE}; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",  # nginx would hold the stream back
            }
        )
        await response.prepare(request)
        try:
            await _stream(request, response, feed)
        except ReaderGone:
            pass
        except ImageSearchError as error:
            # An ordinary end would look like the end of a replay. A broken connection makes the reader come back.
            log.warning("event_stream_broke_off", error=str(error))
            break_off(request)
        return response


def _asks_for_json(request: web.Request) -> bool:
    kinds = {part.partition(";")[0].strip().lower() for part in request.headers.get("Accept", "").split(",")}
    return JSON in kinds and MEDIA_TYPE not in kinds


async def _page(request: web.Request, parameters: EventParameters, cursor: str | None, wanted: FeedFilter) -> web.Response:
    stopping: asyncio.Event = request.app[STOPPING]
    limit = limit_of(request, parameters.limit)
    async with request.app[FEED].open(cursor, wanted) as feed:
        page = await next_page(
            feed, limit=limit, wait_seconds=parameters.wait or 0, is_over=lambda: stopping.is_set() or is_gone(request)
        )
    return web.Response(body=_written(page), content_type=JSON, charset="utf-8", headers={"Cache-Control": "no-store"})


def _written(page: FeedPage) -> bytes:
    """Each event byte by byte as it was published, as in the stream."""
    events = b",".join(message.event for message in page.messages)
    return b'{"events":[%b],"cursor":"%b","more":%b}' % (events, page.cursor.encode(), b"true" if page.more else b"false")


async def _stream(request: web.Request, response: web.StreamResponse, feed: Feed) -> None:
    stopping: asyncio.Event = request.app[STOPPING]
    heartbeat = request.app[SETTINGS].event_heartbeat_seconds
    # An id without data sets the reader's last id and dispatches nothing: who reconnects before the first event has a place.
    await send(request, response, f"retry: {RECONNECT_MS}\nid: {feed.cursor}\n\n".encode())
    sent_at = time.monotonic()
    async for messages in feed:
        if stopping.is_set() or is_gone(request):
            return
        if not await _may_go_on(request):
            # No ordinary end: who comes back is told why it gets no more.
            break_off(request)
            return
        for piece in _pieces(messages):
            await send(request, response, piece)
        if messages:
            sent_at = time.monotonic()
        elif time.monotonic() - sent_at >= heartbeat:
            await send(request, response, f": heartbeat\nid: {feed.cursor}\n\n".encode())
            sent_at = time.monotonic()
    # Behind what a filter left out, so that a reader who comes back does not read it again.
    await send(request, response, f"id: {feed.cursor}\n\n".encode())


async def _may_go_on(request: web.Request) -> bool:
    """A stream outlives the moment in which its key was looked at."""
    key = request.get(API_KEY)
    try:
        return key is None or await request.app[KEY_RING].is_good(key.key_id)
    except StoreUnavailable:
        return True


def _pieces(messages: list[FeedMessage]) -> list[bytes]:
    """Bundled, because each write is a system call, and not too large, because a write is a place to wait for the reader."""
    pieces: list[bytes] = []
    piece = bytearray()
    for message in messages:
        piece += _framed(message)
        if len(piece) >= _WRITE_BYTES:
            pieces.append(bytes(piece))
            piece.clear()
    if piece:
        pieces.append(bytes(piece))
    return pieces


def _framed(message: FeedMessage) -> bytes:
    lines = b"".join(b"data: %b\n" % line for line in message.event.splitlines())
    return b"id: %b\n%b\n" % (message.cursor.encode(), lines)


ENDPOINTS = (
    Endpoint(
        "GET",
        EVENTS_PATH,
        events,
        "What became of objects: CloudEvents as server-sent events, each with a cursor for its id, or a page of them",
        MEDIA_TYPE,
        page=EventPage,
        scope=Scope.READ,
        parameters=EventParameters,
        headers={LAST_EVENT_ID_HEADER: "The id of the last message seen; goes before `cursor`."},
        errors=(
            ErrorCode.INVALID_CURSOR,
            ErrorCode.INVALID_FILTER,
            ErrorCode.CURSOR_EXPIRED,
            ErrorCode.TOO_MANY_READERS,
            ErrorCode.STORE_UNAVAILABLE,
        ),
    ),
)
