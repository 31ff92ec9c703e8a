"""Images as resources: list, one, and its bytes."""

from __future__ import annotations

from urllib.parse import quote

import structlog
from aiohttp import web

from infra.errors import ImageSearchError, ObjectGone
from infra.metadata_store.interface import ImageRow
from infra.object_store.interface import ObjectStream
from query_service.cursors import page_cursor, page_start
from query_service.endpoint import Endpoint, answer, parse, query_of
from query_service.errors import RequestRefused
from query_service.keys import CONTENTS, METADATA, OBJECTS
from query_service.request import grant_of, limit_of, row_of, wait_if_asked
from query_service.search import content_path
from query_service.streaming import ReaderGone, break_off, send
from schemas.access import Scope
from schemas.api import ErrorCode, Image, ImagePage, ImageParameters, ListParameters, time_of_us
from schemas.tables import RowState

_LIVE_STATES = (RowState.INDEXED, RowState.FAILED, RowState.IGNORED)

# By our own row's format, never by what the bucket says: a stored `text/html` would run in the reader's browser.
_MEDIA_TYPES = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "avif": "image/avif",
}

log = structlog.get_logger(__name__)


async def list_images(request: web.Request) -> web.Response:
    parameters = parse(ListParameters, query_of(request))
    limit = limit_of(request, parameters.limit)
    narrow = grant_of(request).narrowed(parameters.narrow)
    rows = await request.app[METADATA].list_rows(
        bucket=narrow.bucket,
        prefix=narrow.prefix,
        where=narrow.where,
        states=_LIVE_STATES if parameters.state is None else (parameters.state,),
        after=None if parameters.cursor is None else page_start(parameters.cursor),
        limit=limit + 1,
    )
    # One more than asked for tells whether there is a next page.
    following = page_cursor(rows[limit - 1].ref) if len(rows) > limit else None
    return answer(ImagePage(images=[image_answer(row) for row in rows[:limit]], limit=limit, next=following))


async def get_image(request: web.Request) -> web.Response:
    parameters = parse(ImageParameters, query_of(request))
    await wait_if_asked(request, parameters.wait_for)
    row = await row_of(request)
    said = await request.app[METADATA].own_metadata([row.object_id])
    return answer(image_answer(row).model_copy(update={"metadata": said.get(row.object_id, {})}))


async def get_content(request: web.Request) -> web.StreamResponse:
    row = await row_of(request)
    contents = request.app[CONTENTS]
    with contents.admit():
        async with contents.turn:
            try:
                async with request.app[OBJECTS].open(row.ref) as stream:
                    return await _send(request, row, stream)
            except ObjectGone:
                raise RequestRefused(
                    ErrorCode.CONTENT_NOT_FOUND, "The object is no longer in its bucket. Its removal is on its way here."
                ) from None


async def _send(request: web.Request, row: ImageRow, stream: ObjectStream) -> web.StreamResponse:
    response = web.StreamResponse(headers=_content_headers(row))
    response.etag = stream.stat.etag
    if any(known.value in (stream.stat.etag, "*") for known in request.if_none_match or ()):
        response.set_status(304)
        await response.prepare(request)
        return response
    response.content_length = stream.stat.size
    await response.prepare(request)
    try:
        async for chunk in stream.chunks:
            await send(request, response, chunk)
    except ReaderGone:
        pass
    except ImageSearchError as error:
        log.warning("content_broke_off", key=row.ref.key, error=str(error))
        break_off(request)
    return response


def _content_headers(row: ImageRow) -> dict[str, str]:
    media_type = _MEDIA_TYPES.get((row.format or "").lower()) if row.state is RowState.INDEXED else None
    name = quote(row.ref.key.rstrip("/").rpartition("/")[2], safe="", errors="replace")
    disposition = "attachment" if media_type is None else "inline"
    return {
        "Content-Type": media_type or "application/octet-stream",
        "Content-Disposition": f"{disposition}; filename*=UTF-8''{name}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        # The key can be overwritten at any time: ask again, and be told 304 when nothing has changed.
        "Cache-Control": "private, no-cache",
    }


def image_answer(row: ImageRow) -> Image:
    return Image(
        id=row.object_id.hex(),
        bucket=row.ref.bucket,
        key=row.ref.key,
        state=row.state,
        reason=row.reason,
        message=row.message,
        content_hash=None if row.content_hash is None else row.content_hash.hex(),
        etag=row.etag,
        version=row.version,
        size=row.size,
        width=row.width,
        height=row.height,
        format=row.format,
        put_time=None if row.put_time_us is None else time_of_us(row.put_time_us),
        updated_at=time_of_us(row.updated_at_us),
        generation=row.generation,
        attempt=row.attempt,
        url=content_path(row.object_id),
    )


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/images",
        list_images,
        "Objects that are indexed, failed or ignored",
        ImagePage,
        scope=Scope.READ,
        parameters=ListParameters,
        errors=(ErrorCode.INVALID_CURSOR, ErrorCode.INVALID_FILTER, ErrorCode.STORE_UNAVAILABLE),
    ),
    Endpoint(
        "GET",
        "/v1/images/{id}",
        get_image,
        "One object: what it is and what became of it",
        Image,
        scope=Scope.READ,
        parameters=ImageParameters,
        errors=(
            ErrorCode.INVALID_ID,
            ErrorCode.INVALID_WAIT_FOR,
            ErrorCode.IMAGE_NOT_FOUND,
            ErrorCode.WAIT_TIMEOUT,
            ErrorCode.STORE_UNAVAILABLE,
            ErrorCode.STORE_REFUSED,
        ),
    ),
    Endpoint(
        "GET",
        "/v1/images/{id}/content",
        get_content,
        "The picture's bytes, from its bucket",
        "image/*",
        scope=Scope.READ,
        errors=(
            ErrorCode.INVALID_ID,
            ErrorCode.IMAGE_NOT_FOUND,
            ErrorCode.CONTENT_NOT_FOUND,
            ErrorCode.TOO_MANY_REQUESTS,
            ErrorCode.STORE_UNAVAILABLE,
            ErrorCode.STORE_REFUSED,
        ),
    ),
)
