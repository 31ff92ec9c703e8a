"""What a scan writes, paced by the workers, and how long it waits for a store that is down."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar

import structlog
from pydantic import ValidationError

from infra.errors import ConfigurationError, ObjectGone, StoreRefused, StoreUnavailable, TransientError
from infra.kafka.interface import Producer
from infra.metrics import RETRIES
from infra.object_store.interface import ObjectStat, ObjectStore
from infra.retry import until_done
from ingest_bridge.announcing import Source, announced
from ingest_bridge.backlog import POLL_SECONDS, Backlog
from ingest_bridge.comparison import Difference
from ingest_bridge.scan_state import ScanFailed, ScanProgress
from schemas.events import Cause, ObjectChange, ObjectEvent, event_source
from schemas.identity import ObjectRef
from schemas.topics import OBJECTS

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

GIVE_UP_SECONDS = 60.0
"""A store that is down for longer ends the scan, which is then tried again from its start."""
STATS_AT_ONCE = 16
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ScanEvents:
    """The events of one scan. The same scan, taken up again, says the same with the same ids."""

    def __init__(
        self,
        scan_id: str,
        progress: ScanProgress,
        *,
        deployment: str,
        objects: ObjectStore,
        producer: Producer,
        backlog: Backlog,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        give_up_seconds: float = GIVE_UP_SECONDS,
    ) -> None:
        self.now_us, self.sleep = now_us, sleep
        self._scan_id, self._progress, self._deployment = scan_id, progress, deployment
        self._objects, self._producer, self._backlog = objects, producer, backlog
        self._give_up_seconds = give_up_seconds

    def changed(self, stat: ObjectStat, found: Difference) -> ObjectEvent | None:
        """None for an object that no event can name: it is counted and logged."""
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
            self.note_unnameable(stat.ref)
            return None
        return self._event(change)

    def gone(self, ref: ObjectRef, cause: Cause = Cause.SCAN) -> ObjectEvent:
        return self._event(ObjectChange(bucket=ref.bucket, key=ref.key, cause=cause, removed=True))

    def note_unnameable(self, ref: ObjectRef) -> None:
        log.warning("an object has a key that no event can carry", bucket=ref.bucket, key=ref.key)
        self._progress.unnameable += 1

    def _event(self, change: ObjectChange) -> ObjectEvent:
        identity = f"{self._scan_id}\0{change.cause}\0{change.removed}\0{change.ref}".encode("utf-8", "surrogatepass")
        return ObjectEvent(
            id=hashlib.sha256(identity).hexdigest(),
            source=event_source(self._deployment, change.bucket),
            subject=str(change.ref),
            time=_EPOCH + timedelta(microseconds=self.now_us()),
            data=change,
        )

    async def write(self, events: Sequence[ObjectEvent]) -> None:
        """Paced by the workers: returns when the broker has all of them."""
        while events:
            room = await self._room()
            some, events = events[:room], events[room:]
            with announced(some, Source.SCAN) as messages:
                await self.patiently(partial(self._producer.send, OBJECTS, messages))
            self._progress.written += len(some)

    async def _room(self) -> int:
        try:
            while (room := await self.patiently(self._backlog.room)) < 1:
                self._progress.waiting_for_workers = True
                await self.sleep(POLL_SECONDS)
        finally:
            self._progress.waiting_for_workers = False
        return room

    async def stats(self, refs: Sequence[ObjectRef]) -> list[ObjectStat | None]:
        """What lies at each of these now; None where nothing does."""
        found: list[ObjectStat | None] = []
        for start in range(0, len(refs), STATS_AT_ONCE):
            some = refs[start : start + STATS_AT_ONCE]
            found += await asyncio.gather(*(self.patiently(partial(self._stat, ref)) for ref in some))
        return found

    async def _stat(self, ref: ObjectRef) -> ObjectStat | None:
        try:
            return await self._objects.stat(ref)
        except ObjectGone:
            return None

    async def patiently(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Waits for a store that is down, up to a limit. One that is well and refuses ends the scan at once."""

        async def unless_refused() -> Result:
            try:
                return await call()
            except (StoreRefused, ConfigurationError) as error:
                removed = f"{self._progress.removed} objects were" if self._progress.removed else "Nothing was"
                raise ScanFailed(f"{error}. {removed} removed") from error

        return await until_done(unless_refused, on_wait=_waited_for, give_up_after_seconds=self._give_up_seconds)


def _waited_for(error: TransientError, attempt: int) -> None:
    RETRIES.labels(error.store if isinstance(error, StoreUnavailable) else "scan").inc()
    log.warning("a scan waits", reason=str(error), attempt=attempt)
