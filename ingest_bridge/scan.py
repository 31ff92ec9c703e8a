"""Lists a bucket and writes object events for what differs from the rows: what notifications missed is found here.

Five phases. *Listing* takes down which objects there are: it is quick, gives a total, and a removal is never decided from a
listing that was cut in two. *Comparing* lists again, page by page, against the rows; a scan that was interrupted goes on
behind the last key. *Removing* looks at rows whose object was not listed. *Publishing* reminds of outcomes still owed for
deleted objects. *Vectors* holds the collections against the rows (vector_scan.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from infra.errors import TransientError
from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow
from infra.object_store.interface import ObjectStat, ObjectStore
from infra.vector_store.interface import VectorStore
from ingest_bridge.comparison import Difference, difference, is_forgotten, is_same_object
from ingest_bridge.object_id_set import ObjectIdSet
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_state import RemovalGuard, RemovalStopped, ScanPhase, ScanProgress
from ingest_bridge.vector_scan import VectorScan
from schemas.events import Cause, ObjectEvent
from schemas.identity import ObjectRef
from schemas.jobs import ScanArguments
from schemas.tables import KEPT_STATES, RowState

ROWS_PAGE = 1000
LIVE_STATES = frozenset(RowState) - {RowState.DELETED}


class Scan:
    """One scan. `progress` may be read at any time, and given to another one to go on from there."""

    def __init__(
        self,
        arguments: ScanArguments,
        progress: ScanProgress,
        *,
        events: ScanEvents,
        guard: RemovalGuard,
        objects: ObjectStore,
        metadata: MetadataStore,
        vectors: VectorStore,
    ) -> None:
        self.progress = progress
        self._arguments, self._events, self._guard = arguments, events, guard
        self._objects, self._metadata, self._vectors = objects, metadata, vectors
        self._listed = ObjectIdSet()

    async def run(self) -> None:
        """Raises ScanFailed or RemovalStopped, and StoreUnavailable when a store stayed away for too long."""
        await self._list()
        models = await self._events.patiently(self._models_in_use)
        await self._compare(models)
        await self._remove()
        await self._remind()
        await self._check_vectors(models)
        self.progress.phase = ScanPhase.DONE
        self.progress.eta_seconds = 0.0

    # -- listing and comparing ---------------------------------------------------------------------------------------
    async def _list(self) -> None:
        self.progress.phase = ScanPhase.LISTING
        self.progress.listed = 0
        async for page in self._pages(None):
            self._listed.add(stat.ref.object_id for stat in page)
            self.progress.listed = len(self._listed)

    async def _compare(self, models: Sequence[ModelRow]) -> None:
        self.progress.phase = ScanPhase.COMPARING
        started, compared_before = time.monotonic(), self.progress.compared
        async for page in self._pages(self.progress.last_key):
            await self._events.write(await self._events_for(page, models))
            self.progress.compared += len(page)
            self.progress.last_key = page[-1].ref.key
            rate = (self.progress.compared - compared_before) / max(time.monotonic() - started, 1e-3)
            self.progress.eta_seconds = round(max(0, self.progress.listed - self.progress.compared) / rate, 1)

    async def _models_in_use(self) -> list[ModelRow]:
        return await self._metadata.models(KEPT_STATES)

    async def _events_for(self, page: Sequence[ObjectStat], models: Sequence[ModelRow]) -> list[ObjectEvent]:
        ids = [stat.ref.object_id for stat in page]
        rows = await self._events.patiently(lambda: self._metadata.rows(ids))
        held = await self._events.patiently(lambda: self._metadata.models_of(ids)) if models else {}
        events = []
        for stat in page:
            object_id = stat.ref.object_id
            found = difference(
                stat, rows.get(object_id), held=held.get(object_id, {}), models=models, now_us=self._events.now_us()
            )
            if found and (event := self._events.changed(stat, found)):
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

        while (page := await self._events.patiently(next_page)) is not None:
            after = page[-1].ref.key
            if pictures := [stat for stat in page if not stat.ref.is_reserved]:
                yield pictures

    # -- removing ----------------------------------------------------------------------------------------------------
    async def _remove(self) -> None:
        """First all is looked at, then the events are written: a removal too large must not have begun."""
        self.progress.phase = ScanPhase.REMOVING
        gone = await self._confirmed_gone()
        async for rows in self._live_rows():
            found = [row for row, is_gone in zip(rows, gone.has(row.object_id for row in rows), strict=True) if is_gone]
            await self._events.write([self._events.gone(row.ref) for row in found])
            self.progress.removed += len(found)

    async def _confirmed_gone(self) -> ObjectIdSet:
        """Rows that were not in the listing and whose object, asked for by name, is not there. Raises RemovalStopped."""
        gone, rows_seen, missing = ObjectIdSet(), 0, 0
        rows_total = await self._events.patiently(self._count_live_rows)
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
        for row, stat in zip(rows, await self._events.stats([row.ref for row in rows]), strict=True):
            if stat is None:
                gone.append(row)
            elif not is_same_object(stat, row) and (event := self._events.changed(stat, Difference(Cause.SCAN))):
                changed.append(event)
        await self._events.write(changed)
        return gone

    async def _live_rows(self) -> AsyncIterator[list[ImageRow]]:
        after: ObjectRef | None = None

        async def next_page() -> list[ImageRow]:
            return await self._metadata.list_rows(
                bucket=self._arguments.bucket, prefix=self._arguments.prefix, states=LIVE_STATES, after=after, limit=ROWS_PAGE
            )

        while rows := await self._events.patiently(next_page):
            after = rows[-1].ref
            yield rows

    async def _count_live_rows(self) -> int:
        counts = await self._metadata.counts(bucket=self._arguments.bucket, prefix=self._arguments.prefix)
        return sum(count for state, count in counts.items() if state in LIVE_STATES)

    def _what_stopped(self, missing: int, rows: int) -> str:
        arguments = self._arguments
        return (
            f"{missing} of {rows} indexed objects under {arguments.bucket}/{arguments.prefix} are not in the bucket any more. "
            f"That is more than {self._guard.limit} and more than {self._guard.share:.0%}, so nothing was removed. "
            f"If they were deleted on purpose, run: {arguments.command()} --allow-removal"
        )

    # -- outcomes still owed -----------------------------------------------------------------------------------------
    async def _remind(self) -> None:
        """Of deleted objects whose outcome is owed; comparing finds the others. A worker then publishes what the row owes."""
        self.progress.phase = ScanPhase.PUBLISHING
        rows = await self._events.patiently(self._metadata.unpublished)
        forgotten = [row for row in rows if row.state is RowState.DELETED and is_forgotten(row, self._events.now_us())]
        await self._events.write([self._events.gone(row.ref, Cause.REPAIR) for row in forgotten if self._covers(row.ref)])

    def _covers(self, ref: ObjectRef) -> bool:
        return ref.bucket == self._arguments.bucket and ref.key.startswith(self._arguments.prefix)

    # -- vectors -----------------------------------------------------------------------------------------------------
    async def _check_vectors(self, models: Sequence[ModelRow]) -> None:
        self.progress.phase = ScanPhase.VECTORS
        # Its 8 bytes an object are done with: the next phase keeps as much.
        self._listed = ObjectIdSet()
        scan = VectorScan(
            self._arguments,
            self.progress,
            events=self._events,
            guard=self._guard,
            metadata=self._metadata,
            vectors=self._vectors,
        )
        await scan.run(models)
