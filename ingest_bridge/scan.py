"""Lists a bucket and writes object events for what differs from the rows: what notifications missed is found here.

Four phases. *Listing* takes down which objects there are: it is quick, gives a total, and a removal is never decided from a
listing that was cut in two. *Comparing* lists again, page by page, against the rows; a scan that was interrupted goes on
behind the last key. *Removing* looks at rows whose object was not listed. *Publishing* reminds of outcomes still owed for
deleted objects.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ObjectGone, PermanentError, StoreRefused, StoreUnavailable, TransientError
from infra.kafka.interface import Message, Producer
from infra.metadata_store.interface import ImageRow, MetadataStore
from infra.metrics import EVENTS_WRITTEN, RETRIES
from infra.object_store.interface import ObjectStat, ObjectStore
from infra.retry import until_done
from ingest_bridge.backlog import POLL_SECONDS, Backlog
from ingest_bridge.comparison import Difference, difference, is_forgotten, is_same_object
from ingest_bridge.object_id_set import ObjectIdSet
from schemas.events import Cause, ObjectChange, ObjectEvent, event_source
from schemas.identity import ModelFingerprint, ObjectRef
from schemas.tables import ModelState, RowState
from schemas.topics import OBJECTS

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

GIVE_UP_SECONDS = 60.0
"""A store that is down for longer ends the scan, which is then tried again from its start."""
ROWS_PAGE = 1000
STATS_AT_ONCE = 16
LIVE_STATES = frozenset(RowState) - {RowState.DELETED}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ScanPhase(StrEnum):
    QUEUED = "queued"
    LISTING = "listing"
    COMPARING = "comparing"
    REMOVING = "removing"
    PUBLISHING = "publishing"
    DONE = "done"


class ScanArguments(BaseModel):
    """What is asked of a scan: the arguments of its job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket: str
    prefix: str = ""
    allow_removal: bool = False


class ScanProgress(BaseModel):
    """How far a scan is: the progress of its job. All but the phase counts objects."""

    model_config = ConfigDict(extra="ignore")

    phase: ScanPhase = ScanPhase.QUEUED
    listed: int = 0
    compared: int = 0
    written: int = 0
    removed: int = 0
    unnameable: int = 0
    """Objects whose key no event can carry (longer than 1,024 bytes): the log names them."""
    last_key: str | None = None
    waiting_for_workers: bool = False
    eta_seconds: float | None = None


class ScanFailed(PermanentError):
    """The scan could not go on; nothing was removed unless it said so before. Another one may succeed."""


class RemovalStopped(PermanentError):
    """The scan would have removed too many objects. Nothing was removed. The message has the numbers and what to do."""


@dataclass(frozen=True, slots=True)
class RemovalGuard:
    """A scan that would remove more objects than `limit` and more than `share` of the rows stops (invariant 11)."""

    limit: int
    share: float

    def forbids(self, removals: int, rows: int) -> bool:
        return removals > self.limit and removals > self.share * rows


class Scan:
    """One scan. `progress` may be read at any time, and given to another one to go on from there."""

    def __init__(
        self,
        scan_id: str,
        arguments: ScanArguments,
        progress: ScanProgress,
        *,
        deployment: str,
        guard: RemovalGuard,
        objects: ObjectStore,
        metadata: MetadataStore,
        producer: Producer,
        backlog: Backlog,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        give_up_seconds: float = GIVE_UP_SECONDS,
    ) -> None:
        self.progress = progress
        self._scan_id = scan_id
        self._arguments = arguments
        self._deployment = deployment
        self._guard = guard
        self._objects = objects
        self._metadata = metadata
        self._producer = producer
        self._backlog = backlog
        self._now_us = now_us
        self._sleep = sleep
        self._give_up_seconds = give_up_seconds
        self._listed = ObjectIdSet()

    async def run(self) -> None:
        """Raises ScanFailed or RemovalStopped, and StoreUnavailable when a store stayed away for too long."""
        await self._list()
        await self._compare()
        await self._remove()
        await self._remind()
        self.progress.phase = ScanPhase.DONE
        self.progress.eta_seconds = 0.0

    # -- listing and comparing ---------------------------------------------------------------------------------------
    async def _list(self) -> None:
        self.progress.phase = ScanPhase.LISTING
        self.progress.listed = 0
        async for page in self._pages(None):
            self._listed.add(stat.ref.object_id for stat in page)
            self.progress.listed = len(self._listed)

    async def _compare(self) -> None:
        self.progress.phase = ScanPhase.COMPARING
        started, compared_before = time.monotonic(), self.progress.compared
        models = await self._patiently(self._models_in_use)
        async for page in self._pages(self.progress.last_key):
            await self._write(await self._events_for(page, models))
            self.progress.compared += len(page)
            self.progress.last_key = page[-1].ref.key
            rate = (self.progress.compared - compared_before) / max(time.monotonic() - started, 1e-3)
            self.progress.eta_seconds = round(max(0, self.progress.listed - self.progress.compared) / rate, 1)

    async def _models_in_use(self) -> list[ModelFingerprint]:
        return [model.fingerprint for model in await self._metadata.models(frozenset(ModelState) - {ModelState.DROPPED})]

    async def _events_for(self, page: Sequence[ObjectStat], models: Sequence[ModelFingerprint]) -> list[ObjectEvent]:
        ids = [stat.ref.object_id for stat in page]
        rows = await self._patiently(lambda: self._metadata.rows(ids))
        held = await self._patiently(lambda: self._metadata.models_of(ids)) if models else {}
        events = []
        for stat in page:
            object_id = stat.ref.object_id
            found = difference(stat, rows.get(object_id), held=held.get(object_id, {}), models=models, now_us=self._now_us())
            if found and (event := self._changed(stat, found)):
                events.append(event)
        return events

    async def _pages(self, after: str | None) -> AsyncIterator[list[ObjectStat]]:
        """The listing, taken up again behind the last key when the store went away meanwhile."""
        bucket, prefix = self._arguments.bucket, self._arguments.prefix
        pages = self._objects.list_pages(bucket, prefix=prefix, start_after=after)

        async def next_page() -> list[ObjectStat] | None:
            nonlocal pages
            try:
                return await anext(pages, None)
            except TransientError:
                # A generator that raised is finished.
                pages = self._objects.list_pages(bucket, prefix=prefix, start_after=after)
                raise

        while (page := await self._patiently(next_page)) is not None:
            after = page[-1].ref.key
            yield page

    # -- removing ----------------------------------------------------------------------------------------------------
    async def _remove(self) -> None:
        """First all is looked at, then the events are written: a removal too large must not have begun."""
        self.progress.phase = ScanPhase.REMOVING
        gone = await self._confirmed_gone()
        async for rows in self._live_rows():
            found = [row for row, is_gone in zip(rows, gone.has(row.object_id for row in rows), strict=True) if is_gone]
            await self._write([self._gone(row.ref) for row in found])
            self.progress.removed += len(found)

    async def _confirmed_gone(self) -> ObjectIdSet:
        """Rows that were not in the listing and whose object, asked for by name, is not there. Raises RemovalStopped."""
        gone, rows_seen, missing = ObjectIdSet(), 0, 0
        rows_total = await self._patiently(self._count_live_rows)
        stopped = False
        async for rows in self._live_rows():
            listed = self._listed.has(row.object_id for row in rows)
            unlisted = [row for row, is_listed in zip(rows, listed, strict=True) if not is_listed]
            rows_seen += len(rows)
            missing += len(unlisted)
            if not stopped:
                gone.add([row.object_id for row in await self._not_found(unlisted)])
                # A bucket emptied by mistake shall not cost a request an object: from here on they are only counted.
                stopped = not self._arguments.allow_removal and self._guard.forbids(len(gone), max(rows_total, rows_seen))
        if stopped:
            raise RemovalStopped(self._what_stopped(missing, rows_seen))
        return gone

    async def _not_found(self, rows: Sequence[ImageRow]) -> list[ImageRow]:
        """Those whose object is gone. Objects that turn out to have come meanwhile are announced."""
        gone: list[ImageRow] = []
        changed: list[ObjectEvent] = []
        for start in range(0, len(rows), STATS_AT_ONCE):
            some = rows[start : start + STATS_AT_ONCE]
            stats = await asyncio.gather(*(self._patiently(partial(self._stat, row.ref)) for row in some))
            for row, stat in zip(some, stats, strict=True):
                if stat is None:
                    gone.append(row)
                elif not is_same_object(stat, row) and (event := self._changed(stat, Difference(Cause.SCAN))):
                    changed.append(event)
        await self._write(changed)
        return gone

    async def _stat(self, ref: ObjectRef) -> ObjectStat | None:
        try:
            return await self._objects.stat(ref)
        except ObjectGone:
            return None

    async def _live_rows(self) -> AsyncIterator[list[ImageRow]]:
        after: ObjectRef | None = None

        async def next_page() -> list[ImageRow]:
            return await self._metadata.list_rows(
                bucket=self._arguments.bucket, prefix=self._arguments.prefix, states=LIVE_STATES, after=after, limit=ROWS_PAGE
            )

        while rows := await self._patiently(next_page):
            after = rows[-1].ref
            yield rows

    async def _count_live_rows(self) -> int:
        counts = await self._metadata.counts(bucket=self._arguments.bucket, prefix=self._arguments.prefix)
        return sum(count for state, count in counts.items() if state in LIVE_STATES)

    def _what_stopped(self, missing: int, rows: int) -> str:
        arguments = self._arguments
        again = f"image-search scan --bucket {arguments.bucket}"
        if arguments.prefix:
            again += f" --prefix {arguments.prefix}"
        return (
            f"{missing} of {rows} indexed objects under {arguments.bucket}/{arguments.prefix} are not in the bucket any more. "
            f"That is more than {self._guard.limit} and more than {self._guard.share:.0%}, so nothing was removed. "
            f"If they were deleted on purpose, run: {again} --allow-removal"
        )

    # -- outcomes still owed -----------------------------------------------------------------------------------------
    async def _remind(self) -> None:
        """Of deleted objects whose outcome is owed; comparing finds the others. A worker then publishes what the row owes."""
        self.progress.phase = ScanPhase.PUBLISHING
        rows = await self._patiently(self._metadata.unpublished)
        forgotten = [row for row in rows if row.state is RowState.DELETED and is_forgotten(row, self._now_us())]
        await self._write([self._gone(row.ref, Cause.REPAIR) for row in forgotten if self._covers(row.ref)])

    def _covers(self, ref: ObjectRef) -> bool:
        return ref.bucket == self._arguments.bucket and ref.key.startswith(self._arguments.prefix)

    # -- events ------------------------------------------------------------------------------------------------------
    def _changed(self, stat: ObjectStat, found: Difference) -> ObjectEvent | None:
        try:
            change = ObjectChange(
                bucket=stat.ref.bucket,
                key=stat.ref.key,
                cause=found.cause,
                etag=stat.etag,
                version=stat.version,
                put_time=_EPOCH + timedelta(microseconds=stat.put_time_us),
                size=stat.size,
                directory_marker=stat.is_directory_marker,
                attempt=found.attempt,
            )
        except ValidationError:
            log.warning("an object has a key that no event can carry", bucket=stat.ref.bucket, key=stat.ref.key)
            self.progress.unnameable += 1
            return None
        return self._event(change)

    def _gone(self, ref: ObjectRef, cause: Cause = Cause.SCAN) -> ObjectEvent:
        return self._event(ObjectChange(bucket=ref.bucket, key=ref.key, cause=cause, removed=True))

    def _event(self, change: ObjectChange) -> ObjectEvent:
        # The same scan, taken up again, says the same with the same id.
        identity = f"{self._scan_id}\0{change.cause}\0{change.removed}\0{change.ref}".encode("utf-8", "surrogatepass")
        return ObjectEvent(
            id=hashlib.sha256(identity).hexdigest(),
            source=event_source(self._deployment, change.bucket),
            subject=str(change.ref),
            time=_EPOCH + timedelta(microseconds=self._now_us()),
            data=change,
        )

    async def _write(self, events: Sequence[ObjectEvent]) -> None:
        """Paced by the workers: returns when the broker has all of them."""
        while events:
            room = await self._room()
            some, events = events[:room], events[room:]
            messages = [Message(event.data.ref.topic_key, event.to_json()) for event in some]
            await self._patiently(partial(self._producer.send, OBJECTS, messages))
            self.progress.written += len(some)
            for event in some:
                EVENTS_WRITTEN.labels(event.data.cause).inc()

    async def _room(self) -> int:
        try:
            while (room := await self._patiently(self._backlog.room)) < 1:
                self.progress.waiting_for_workers = True
                await self._sleep(POLL_SECONDS)
        finally:
            self.progress.waiting_for_workers = False
        return room

    async def _patiently(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Waits for a store that is down, up to a limit. One that is well and refuses ends the scan at once."""

        async def unless_refused() -> Result:
            try:
                return await call()
            except StoreRefused as error:
                raise ScanFailed(f"{error}. Nothing was removed") from error

        return await until_done(unless_refused, on_wait=_waited_for, give_up_after_seconds=self._give_up_seconds)


def _waited_for(error: TransientError, attempt: int) -> None:
    RETRIES.labels(error.store if isinstance(error, StoreUnavailable) else "scan").inc()
    log.warning("a scan waits", reason=str(error), attempt=attempt)
