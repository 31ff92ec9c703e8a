"""Outcomes for subscribers: replay from any point that is kept, then live, without a gap and without a consumer group.

A cursor names a place in every partition at once, so that a reader who comes back with the last one it saw misses nothing.
Each reader pulls from the broker by itself at its own pace: a slow one makes nothing grow but its own distance.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from pydantic import AwareDatetime, BaseModel, Field

from infra.kafka.interface import Broker, Record
from infra.metrics import EVENT_READERS
from query_service.cursors import events_cursor, events_start
from query_service.errors import RequestRefused, too_busy
from schemas.access import EVERYTHING, Grant
from schemas.api import ErrorCode, microseconds_of
from schemas.events import OutcomeType
from schemas.filter import Filter
from schemas.identity import ContentHash, ObjectRef
from schemas.topics import OUTCOMES

EARLIEST = "earliest"
PAGE_SECONDS = 5.0
"""How long a page is looked for among events that its reader does not want, before it is handed over with what there is."""

log = structlog.get_logger(__name__)

Positions = Mapping[int, int]
"""The next offset to be read, by partition."""


def start_positions(cursor: str | None, offsets: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Where to read on: from the end without a cursor, from the oldest for `earliest`.

    Raises RequestRefused: CURSOR_EXPIRED when some of what follows the cursor is no longer kept (a silent gap would break
    the promise), INVALID_CURSOR when it points to what was never written here.
    """
    if cursor is None:
        return {partition: end for partition, (_, end) in offsets.items()}
    if cursor == EARLIEST:
        return {partition: begin for partition, (begin, _) in offsets.items()}
    positions = events_start(cursor)
    # A partition that the cursor does not know was added after it: all of it is new to this reader.
    start = {partition: positions.get(partition, begin) for partition, (begin, _) in offsets.items()}
    if positions.keys() - offsets.keys() or any(start[partition] > end for partition, (_, end) in offsets.items()):
        raise RequestRefused(
            ErrorCode.INVALID_CURSOR, "This cursor is of another deployment, or its events were wiped. Start with `earliest`."
        )
    if any(start[partition] < begin for partition, (begin, _) in offsets.items()):
        raise _expired()
    return start


def _expired() -> RequestRefused:
    return RequestRefused(
        ErrorCode.CURSOR_EXPIRED, "Events behind this cursor are no longer kept. Start again with `earliest`."
    )


@dataclass(frozen=True, slots=True)
class FeedFilter:
    """No types: all of them. What an outcome does not tell of its object, such as the size of what is gone, matches nothing."""

    types: frozenset[OutcomeType] = frozenset()
    narrow: Filter = Filter()
    grant: Grant = EVERYTHING

    def wants(self, event: bytes) -> bool:
        """Raises ValueError for what is no event."""
        envelope = _Envelope.model_validate_json(event)
        return (
            (not self.types or envelope.type in self.types)
            and self.narrow.matches(envelope.data)
            and self.grant.holds(envelope.data.ref)
        )


@dataclass(frozen=True, slots=True)
class FeedMessage:
    """`event` is the outcome as it was published; `cursor` is the place right behind it."""

    cursor: str
    event: bytes


class _Subject(BaseModel):
    """The object as the outcome tells of it, for filters."""

    bucket: str
    key: str
    content_sha256: str | None = Field(None, alias="content_hash")
    put_time: AwareDatetime | None = None
    size: int | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None

    @property
    def ref(self) -> ObjectRef:
        return ObjectRef(self.bucket, self.key)

    @property
    def content_hash(self) -> ContentHash | None:
        return None if self.content_sha256 is None else ContentHash(bytes.fromhex(self.content_sha256))

    @property
    def put_time_us(self) -> int | None:
        return None if self.put_time is None else microseconds_of(self.put_time)


class _Envelope(BaseModel):
    """What a filter has to know. No more, so that types and fields which are newer than this process pass through."""

    type: str
    data: _Subject


class Feed:
    """One reader's way through the topic. Iterate it: lists of messages, an empty one about each second without news.

    Raises StoreUnavailable, and RequestRefused (CURSOR_EXPIRED) when retention overtakes the reader.
    """

    def __init__(
        self, batches: AsyncIterator[list[Record]], start: Positions, wanted: FeedFilter, ends: Positions, *, follow: bool
    ) -> None:
        self._batches = batches
        self._positions = dict(start)
        self._wanted = wanted
        self._ends = ends
        self._follow = follow

    @property
    def cursor(self) -> str:
        """Behind everything read so far, wanted or not."""
        return events_cursor(self._positions)

    @property
    def has_caught_up(self) -> bool:
        """With all that was there when it was opened."""
        return all(self._positions[partition] >= offset for partition, offset in self._ends.items())

    async def __aiter__(self) -> AsyncIterator[list[FeedMessage]]:
        while self._follow or not self.has_caught_up:
            records = await anext(self._batches)
            yield [message for record in records if (message := self._take(record)) is not None]

    def _take(self, record: Record) -> FeedMessage | None:
        expected = self._positions.get(record.partition, 0)
        if record.offset < expected:
            return None
        if record.offset > expected:
            # Retention passed a slow reader. Going on would be a gap that it cannot see.
            raise _expired()
        self._positions[record.partition] = record.offset + 1
        try:
            wanted = self._wanted.wants(record.value)
        except ValueError:
            log.warning("outcome_not_readable", partition=record.partition, offset=record.offset)
            return None
        return FeedMessage(self.cursor, record.value) if wanted else None


@dataclass(frozen=True, slots=True)
class FeedPage:
    """`more`: whether there is something behind it already, so that its reader need not wait."""

    messages: list[FeedMessage]
    cursor: str
    more: bool


async def next_page(feed: Feed, *, limit: int, wait_seconds: float, is_over: Callable[[], bool]) -> FeedPage:
    """What there is, up to `limit`; when there is nothing, the first that comes in so many seconds (and about one more).

    `feed` follows. `is_over` ends the wait. Raises as the feed does.
    """
    clock = asyncio.get_running_loop().time
    since = clock()
    found: list[FeedMessage] = []
    if wait_seconds or not feed.has_caught_up:
        async for messages in feed:
            found += messages
            waited = clock() - since
            enough = len(found) >= limit or (feed.has_caught_up and (found or waited >= wait_seconds))
            if enough or waited >= max(wait_seconds, PAGE_SECONDS) or is_over():
                break
    page = found[:limit]
    rest = len(found) > limit
    return FeedPage(page, page[-1].cursor if rest else feed.cursor, rest or not feed.has_caught_up)


class EventFeed:
    """Opens feeds, a bounded number at once."""

    def __init__(self, broker: Broker, *, readers: int) -> None:
        self._broker = broker
        self._readers_left = readers

    @asynccontextmanager
    async def open(self, cursor: str | None, wanted: FeedFilter, *, follow: bool = True) -> AsyncIterator[Feed]:
        """`follow=False` ends the feed behind what was there when it was opened.

        Raises StoreUnavailable, and RequestRefused: TOO_MANY_READERS, INVALID_CURSOR, CURSOR_EXPIRED.
        """
        if self._readers_left <= 0:
            raise too_busy("All event streams are taken. Close one, or read the outcomes topic.", ErrorCode.TOO_MANY_READERS)
        self._readers_left -= 1
        EVENT_READERS.inc()
        try:
            offsets = await self._broker.offsets(OUTCOMES)
            start = start_positions(cursor, offsets)
            ends = {partition: end for partition, (_, end) in offsets.items()}
            async with self._broker.read(OUTCOMES, start) as batches:
                yield Feed(batches, start, wanted, ends, follow=follow)
        finally:
            self._readers_left += 1
            EVENT_READERS.dec()
