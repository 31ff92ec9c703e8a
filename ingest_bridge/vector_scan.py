"""Holds each kept model's collection against the rows: a vector that is missing, wrong, or of nothing that is indexed.

No event tells of such a one. A worker that was evicted in the middle of a batch and dies between its vectors and its rows
leaves an older vector behind a right row; a volume that is lost leaves rows without any. Each becomes a repair event, on
which a worker embeds the object anew, or removes what is left of it.

First the collection is read in pages against the rows, then the rows against the ids that were seen, at eight bytes each.
The world moves meanwhile, so whoever is suspected is looked at again after a pause, with reads that see every acknowledged
write. Taken up again after a kill, this begins anew: what was repaired meanwhile is not found again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow
from infra.object_store.interface import ObjectStat
from infra.vector_store.interface import VectorEntry, VectorStore
from ingest_bridge.comparison import Difference, is_left_over, is_same_object, vector_differs
from ingest_bridge.object_id_set import ObjectIdSet
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_state import RemovalGuard, RemovalStopped, ScanFailed, ScanProgress
from schemas.events import Cause, ObjectEvent
from schemas.filter import Place
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.jobs import ScanArguments
from schemas.tables import RowState

PAGE = 1000
GRACE_SECONDS = 2.0
"""Longer than a worker takes from writing an object's vector to writing its row."""


@dataclass(frozen=True, slots=True)
class _View:
    """One object as all three stores show it at the second look."""

    ref: ObjectRef
    row: ImageRow | None
    named: bool
    """Whether its row says that the model holds a vector of it."""
    held: ContentHash | None
    stat: ObjectStat | None


class VectorScan:
    """The vectors' part of one scan. `progress` is the scan's."""

    def __init__(
        self,
        arguments: ScanArguments,
        progress: ScanProgress,
        *,
        events: ScanEvents,
        guard: RemovalGuard,
        metadata: MetadataStore,
        vectors: VectorStore,
    ) -> None:
        self._arguments, self._progress, self._events, self._guard = arguments, progress, events, guard
        self._metadata, self._vectors = metadata, vectors
        self._place = Place(arguments.bucket, arguments.prefix)
        self._seen = ObjectIdSet()
        self._left_over = ObjectIdSet()
        self._suspects: dict[ObjectId, ObjectRef] = {}
        self._started = time.monotonic()

    async def run(self, models: Sequence[ModelRow]) -> None:
        """Raises RemovalStopped, ScanFailed without a collection, and StoreUnavailable."""
        for model in models:
            await self._check(model)

    async def _check(self, model: ModelRow) -> None:
        if not await self._events.patiently(partial(self._vectors.has_collection, model.collection)):
            raise ScanFailed(f"the collection {model.collection} is missing; run: image-search upgrade")
        self._started, self._progress.checked = time.monotonic(), 0
        self._seen, self._left_over = ObjectIdSet(), ObjectIdSet()
        stored = await self._events.patiently(partial(self._vectors.count, model.collection))
        counts = await self._events.patiently(self._counts)
        self._progress.to_check = stored + counts.get(RowState.INDEXED, 0)
        here = await self._compare_vectors(model)
        await self._compare_rows(model)
        await self._remove_left_over(model, here)

    async def _counts(self) -> Mapping[RowState, int]:
        return await self._metadata.counts(bucket=self._arguments.bucket, prefix=self._arguments.prefix)

    async def _compare_vectors(self, model: ModelRow) -> int:
        """How many vectors there are below the prefix."""
        here = 0
        async for page in self._vector_pages(model.collection):
            entries = self._covered(page)
            here += len(entries)
            self._seen.add(entry.object_id for entry in entries)
            rows = await self._rows([entry.object_id for entry in entries])
            for entry in entries:
                # Whether a row names the model matters only where the vector is missing.
                if vector_differs(rows.get(entry.object_id), named=True, held=entry.content_hash):
                    await self._suspect(model, entry.object_id, entry.ref)
            self._advance(len(page))
        await self._look_again(model)
        return here

    async def _compare_rows(self, model: ModelRow) -> None:
        async for rows in self._indexed_rows():
            seen = self._seen.has(row.object_id for row in rows)
            unseen = [row for row, is_seen in zip(rows, seen, strict=True) if not is_seen]
            named = await self._named(model.fingerprint, [row.object_id for row in unseen])
            for row in unseen:
                if named.get(row.object_id):
                    await self._suspect(model, row.object_id, row.ref)
            self._advance(len(rows))
        await self._look_again(model)

    # -- the second look ---------------------------------------------------------------------------------------------
    async def _suspect(self, model: ModelRow, object_id: ObjectId, ref: ObjectRef) -> None:
        self._suspects[object_id] = ref
        if len(self._suspects) >= PAGE:
            await self._look_again(model)

    async def _look_again(self, model: ModelRow) -> None:
        if not self._suspects:
            return
        await self._events.sleep(GRACE_SECONDS)
        suspects, self._suspects = self._suspects, {}
        events: list[ObjectEvent] = []
        for object_id, view in (await self._views(model, suspects)).items():
            if not vector_differs(view.row, named=view.named, held=view.held):
                continue
            if is_left_over(view.stat, view.row):
                self._left_over.add([object_id])
            elif event := self._repair(view):
                events.append(event)
        await self._write(events)

    def _repair(self, view: _View) -> ObjectEvent | None:
        """None where object and row differ: that was announced when they were compared, or is by a notification."""
        if view.stat is None or view.row is None or not is_same_object(view.stat, view.row):
            return None
        return self._events.changed(view.stat, Difference(Cause.REPAIR, view.row.attempt))

    async def _views(self, model: ModelRow, suspects: Mapping[ObjectId, ObjectRef]) -> dict[ObjectId, _View]:
        ids = list(suspects)
        fetch = partial(self._vectors.fetch, model.collection, ids, strong=True)
        held = {object_id: vector.content_hash for object_id, vector in (await self._events.patiently(fetch)).items()}
        rows, named = await self._rows(ids), await self._named(model.fingerprint, ids)
        # The row's key is exact; a collection's may stand for bytes that it could not hold, and names no object then.
        refs = {object_id: rows[object_id].ref if object_id in rows else ref for object_id, ref in suspects.items()}
        for object_id, ref in list(refs.items()):
            if ref.object_id != object_id:
                self._events.note_unnameable(refs.pop(object_id))
        stats = await self._events.stats(list(refs.values()))
        return {
            object_id: _View(ref, rows.get(object_id), object_id in named, held.get(object_id), stat)
            for (object_id, ref), stat in zip(refs.items(), stats, strict=True)
        }

    # -- what nothing in the bucket owns -----------------------------------------------------------------------------
    async def _remove_left_over(self, model: ModelRow, here: int) -> None:
        """All was looked at before the first event is written: a removal too large must not have begun."""
        if not len(self._left_over):
            return
        if not self._arguments.allow_removal and self._guard.forbids(len(self._left_over), here):
            raise RemovalStopped(
                f"{len(self._left_over)} of {here} vectors under {self._place.bucket}/{self._place.prefix} are of objects "
                "that are not in the bucket and have no row. They were not removed. If they were deleted on purpose, run: "
                f"{self._arguments.command()} --allow-removal"
            )
        async for page in self._vector_pages(model.collection):
            entries = self._covered(page)
            left = self._left_over.has(entry.object_id for entry in entries)
            found = [entry.ref for entry, is_left in zip(entries, left, strict=True) if is_left]
            await self._write([self._events.gone(ref, Cause.REPAIR) for ref in found])

    async def _write(self, events: Sequence[ObjectEvent]) -> None:
        await self._events.write(events)
        self._progress.repairs += len(events)

    # -- pages -------------------------------------------------------------------------------------------------------
    async def _vector_pages(self, collection: str) -> AsyncIterator[list[VectorEntry]]:
        after: ObjectId | None = None
        while page := await self._events.patiently(partial(self._vectors.page, collection, after=after, limit=PAGE)):
            after = page[-1].object_id
            yield page

    async def _indexed_rows(self) -> AsyncIterator[list[ImageRow]]:
        after: ObjectRef | None = None
        bucket, prefix = self._arguments.bucket, self._arguments.prefix
        listing = partial(self._metadata.list_rows, bucket=bucket, prefix=prefix, states=[RowState.INDEXED], limit=PAGE)
        while rows := await self._events.patiently(partial(listing, after=after)):
            after = rows[-1].ref
            yield rows

    def _covered(self, page: Sequence[VectorEntry]) -> list[VectorEntry]:
        return [entry for entry in page if self._place.holds(entry.ref)]

    async def _rows(self, ids: Sequence[ObjectId]) -> dict[ObjectId, ImageRow]:
        return await self._events.patiently(partial(self._metadata.rows, ids)) if ids else {}

    async def _named(self, model: ModelFingerprint, ids: Sequence[ObjectId]) -> dict[ObjectId, ContentHash]:
        models = await self._events.patiently(partial(self._metadata.models_of, ids)) if ids else {}
        return {object_id: of_model[model] for object_id, of_model in models.items() if model in of_model}

    def _advance(self, number: int) -> None:
        progress = self._progress
        progress.checked += number
        # The two readings of a collection that is being written to need not add up to what was counted first.
        progress.to_check = max(progress.to_check, progress.checked)
        rate = progress.checked / max(time.monotonic() - self._started, 1e-3)
        progress.eta_seconds = round((progress.to_check - progress.checked) / rate, 1)
