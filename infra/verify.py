"""Compare bucket, metadata and vectors from outside. Changes nothing.

The three are read one after another while the world moves on, so a difference is at first only a suspicion. A suspect is
looked at again, whole, after a short grace and with reads that see every acknowledged write; what then still does not fit
is a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from infra import metadata_store, object_store, vector_store
from infra.errors import ObjectGone
from infra.followed_buckets import followed_buckets
from infra.metadata_store.interface import ImageRow, MetadataStore
from infra.object_store.interface import ObjectStat, ObjectStore
from infra.settings import CommonSettings
from infra.vector_store.interface import VectorEntry, VectorStore
from schemas.filter import Place
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.tables import ModelState, RowState

GRACE_SECONDS = 2.0
"""Longer than an object event needs on its way through an idle system."""

MOST_LISTED = 1000
PAGE_ROWS = 1000
SUSPECTS_AT_ONCE = 2000
STATS_AT_ONCE = 16

Progress = Callable[[str, int], None]
"""Hears what is being read (objects, rows, vectors) and how many so far."""


class FindingKind(StrEnum):
    MISSING = "missing"
    """An object without a row, or an indexed row without its vector."""
    GHOST = "ghost"
    """A row that is not deleted though its object is gone, or a vector without an indexed row."""
    STALE = "stale"
    """A row of other bytes than the object's: their ETags differ."""
    DOUBLED = "doubled"
    """An object twice in a collection."""
    WRONG_VECTOR = "wrong_vector"
    """A vector of other bytes than the row's: their content hashes differ."""
    UNPUBLISHED = "unpublished"
    """A row whose outcomes the broker does not have."""


@dataclass(frozen=True, slots=True)
class Finding:
    kind: FindingKind
    bucket: str
    key: str
    object_id: str
    detail: str
    collection: str | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """All are counted; the first 1,000 are listed."""

    total: int
    listed: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """`rows` by state, `vectors` by collection; every kind of finding is there, most of them empty."""

    objects: int
    rows: Mapping[str, int]
    vectors: Mapping[str, int]
    findings: Mapping[FindingKind, Findings]

    @property
    def clean(self) -> bool:
        return not any(findings.total for findings in self.findings.values())

    def to_json(self) -> str:
        return json.dumps({"clean": self.clean, **asdict(self)})


async def verify(
    settings: CommonSettings,
    *,
    buckets: Sequence[str] | None = None,
    prefix: str = "",
    progress: Progress | None = None,
) -> Report:
    """Verify these buckets (None: all that are followed) below this prefix.

    Raises StoreUnavailable, StoreRefused (a bucket that is missing is a fault, not an empty one) and ConfigurationError.
    """
    async with contextlib.AsyncExitStack() as stores:
        objects = await object_store.connect(settings)
        stores.push_async_callback(objects.close)
        metadata = await metadata_store.connect(settings)
        stores.push_async_callback(metadata.close)
        vectors = await vector_store.connect(settings)
        stores.push_async_callback(vectors.close)
        return await verify_stores(
            objects,
            metadata,
            vectors,
            buckets=buckets or await followed_buckets(settings, metadata),
            prefix=prefix,
            progress=progress,
        )


async def verify_stores(
    objects: ObjectStore,
    metadata: MetadataStore,
    vectors: VectorStore,
    *,
    buckets: Sequence[str],
    prefix: str = "",
    progress: Progress | None = None,
    grace_seconds: float = GRACE_SECONDS,
    whole: frozenset[ModelFingerprint] = frozenset(),
) -> Report:
    """`whole`: models that must hold every indexed row, as the active one must."""
    return await _Verification(objects, metadata, vectors, buckets, prefix, progress or _silent, grace_seconds, whole).run()


def _silent(_what: str, _number: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Collection:
    name: str
    fingerprint: ModelFingerprint
    # Every indexed row has a vector in it, as in the active model's; in the others only where a row says so.
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _View:
    """One object as all three stores see it at about the same time."""

    object_id: ObjectId
    ref: ObjectRef
    stat: ObjectStat | None
    row: ImageRow | None
    vectors: Mapping[_Collection, ContentHash]
    models: frozenset[ModelFingerprint]


def _findings_of(view: _View, collections: Sequence[_Collection]) -> Iterator[Finding]:
    row, stat = view.row, view.stat
    live = row if row is not None and row.state is not RowState.DELETED else None
    if stat is not None and live is None and not stat.is_directory_marker:
        yield _finding(FindingKind.MISSING, view, "the object has no row" if row is None else "its row is deleted")
    if live is not None and stat is None:
        yield _finding(FindingKind.GHOST, view, f"the object is gone, its row is {live.state}")
    if live is not None and stat is not None and _is_of_other_bytes(live, stat):
        yield _finding(FindingKind.STALE, view, f"the object's etag is {stat.etag}, the row's {live.etag}")
    if row is not None and not row.is_published:
        yield _finding(FindingKind.UNPUBLISHED, view, f"generation {row.generation} is not published")
    for collection in collections:
        yield from _vector_findings(view, collection)


def _vector_findings(view: _View, collection: _Collection) -> Iterator[Finding]:
    held = view.vectors.get(collection)
    row = view.row
    if row is None or row.state is not RowState.INDEXED:
        if held is not None:
            state = "no row" if row is None else f"row {row.state}"
            yield _finding(FindingKind.GHOST, view, f"a vector, but {state}", collection)
    elif held is None:
        if collection.is_whole or collection.fingerprint in view.models:
            yield _finding(FindingKind.MISSING, view, "the row is indexed, but has no vector", collection)
    elif held != row.content_hash:
        yield _finding(FindingKind.WRONG_VECTOR, view, "the vector is of other bytes than the row", collection)


def _is_of_other_bytes(row: ImageRow, stat: ObjectStat) -> bool:
    # What failed or was ignored without being read may have no ETag: there is nothing to compare then.
    settled_unread = row.etag is None and row.state is not RowState.INDEXED
    return row.etag != stat.etag and not settled_unread


def _finding(kind: FindingKind, of: _View | VectorEntry, detail: str, collection: _Collection | None = None) -> Finding:
    name = collection.name if collection is not None else None
    return Finding(kind, of.ref.bucket, of.ref.key, of.object_id.hex(), detail, name)


@dataclass
class _Verification:
    """Holds the ids of what it saw, about 100 bytes each, and never rows or vectors."""

    objects: ObjectStore
    metadata: MetadataStore
    vectors: VectorStore
    buckets: Sequence[str]
    prefix: str
    progress: Progress
    grace_seconds: float
    whole: frozenset[ModelFingerprint]
    collections: list[_Collection] = field(default_factory=list)
    vector_ids: dict[str, set[ObjectId]] = field(default_factory=dict)
    object_ids: set[ObjectId] = field(default_factory=set)
    row_states: Counter[str] = field(default_factory=Counter)
    vector_counts: Counter[str] = field(default_factory=Counter)
    suspects: dict[ObjectId, ObjectRef] = field(default_factory=dict)
    guilty: set[ObjectId] = field(default_factory=set)
    totals: Counter[FindingKind] = field(default_factory=Counter)
    listed: dict[FindingKind, list[Finding]] = field(default_factory=lambda: {kind: [] for kind in FindingKind})

    async def run(self) -> Report:
        await self._find_collections()
        for collection in self.collections:
            await self._read_vectors(collection)
        for bucket in self.buckets:
            await self._read_objects(bucket)
        for bucket in self.buckets:
            await self._read_rows(bucket)
        await self._look_again()
        return Report(
            objects=len(self.object_ids),
            rows=dict(self.row_states),
            vectors=dict(self.vector_counts),
            findings={kind: Findings(self.totals[kind], tuple(self.listed[kind])) for kind in FindingKind},
        )

    async def _find_collections(self) -> None:
        for model in await self.metadata.models():
            if model.state is ModelState.DROPPED or not await self.vectors.has_collection(model.collection):
                continue
            is_whole = model.state is ModelState.ACTIVE or model.fingerprint in self.whole
            self.collections.append(_Collection(model.collection, model.fingerprint, is_whole))

    async def _read_vectors(self, collection: _Collection) -> None:
        ids = self.vector_ids.setdefault(collection.name, set())
        self.vector_counts[collection.name] = 0
        places = [Place(bucket, self.prefix) for bucket in self.buckets]
        doubled: dict[ObjectId, VectorEntry] = {}
        after: ObjectId | None = None
        while entries := await self.vectors.page(collection.name, after=after, limit=PAGE_ROWS):
            after = entries[-1].object_id
            here = [entry for entry in entries if any(place.holds(entry.ref) for place in places)]
            rows = await self.metadata.rows({entry.object_id for entry in here})
            for entry in here:
                row = rows.get(entry.object_id)
                if row is None or row.state is not RowState.INDEXED or row.content_hash != entry.content_hash:
                    self.suspects[entry.object_id] = entry.ref
                if entry.object_id in ids:
                    doubled[entry.object_id] = entry
                ids.add(entry.object_id)
            self.vector_counts[collection.name] += len(here)
            self.progress("vectors", sum(self.vector_counts.values()))
            await self._look_again_if_many()
        await self._look_again_at_doubled(collection, doubled)

    async def _read_objects(self, bucket: str) -> None:
        async for stats in self.objects.list_pages(bucket, prefix=self.prefix):
            by_id = {stat.ref.object_id: stat for stat in stats if not stat.ref.is_reserved}
            rows = await self.metadata.rows(by_id.keys())
            for object_id, stat in by_id.items():
                row = rows.get(object_id)
                if row is None or row.state is RowState.DELETED or _is_of_other_bytes(row, stat):
                    self.suspects[object_id] = stat.ref
            self.object_ids.update(by_id)
            self.progress("objects", len(self.object_ids))
            await self._look_again_if_many()

    async def _read_rows(self, bucket: str) -> None:
        after: ObjectRef | None = None
        while rows := await self.metadata.list_rows(bucket=bucket, prefix=self.prefix, after=after, limit=PAGE_ROWS):
            after = rows[-1].ref
            models = await self.metadata.models_of([row.object_id for row in rows])
            for row in rows:
                self.row_states[row.state] += 1
                if self._is_suspect(row, models.get(row.object_id, {}).keys()):
                    self.suspects[row.object_id] = row.ref
            self.progress("rows", self.row_states.total())
            await self._look_again_if_many()

    def _is_suspect(self, row: ImageRow, models: Collection[ModelFingerprint]) -> bool:
        if not row.is_published:
            return True
        if row.state is not RowState.DELETED and row.object_id not in self.object_ids:
            return True
        return row.state is RowState.INDEXED and any(
            row.object_id not in self.vector_ids[collection.name]
            for collection in self.collections
            if collection.is_whole or collection.fingerprint in models
        )

    async def _look_again_if_many(self) -> None:
        if len(self.suspects) >= SUSPECTS_AT_ONCE:
            await self._look_again()

    async def _look_again(self) -> None:
        # What was found guilty was judged whole, and is not counted again when another store's reading suspects it too.
        suspects = {object_id: ref for object_id, ref in self.suspects.items() if object_id not in self.guilty}
        self.suspects.clear()
        if not suspects:
            return
        await asyncio.sleep(self.grace_seconds)
        for view in await self._views(suspects):
            findings = list(_findings_of(view, self.collections))
            if findings:
                self.guilty.add(view.object_id)
            for finding in findings:
                self._report(finding)

    async def _views(self, suspects: Mapping[ObjectId, ObjectRef]) -> list[_View]:
        held = {
            collection: await self.vectors.fetch(collection.name, suspects.keys(), strong=True)
            for collection in self.collections
        }
        rows = await self.metadata.rows(suspects.keys())
        models = await self.metadata.models_of(suspects.keys())
        turns = asyncio.Semaphore(STATS_AT_ONCE)
        # The row's key is exact; a collection's may stand for bytes that it could not hold.
        refs = {object_id: rows[object_id].ref if object_id in rows else ref for object_id, ref in suspects.items()}
        stats = await asyncio.gather(*(self._stat(ref, turns) for ref in refs.values()))
        return [
            _View(
                object_id,
                ref,
                stat,
                rows.get(object_id),
                vectors={held_in: found[object_id].content_hash for held_in, found in held.items() if object_id in found},
                models=frozenset(models.get(object_id, {})),
            )
            for (object_id, ref), stat in zip(refs.items(), stats, strict=True)
        ]

    async def _stat(self, ref: ObjectRef, turns: asyncio.Semaphore) -> ObjectStat | None:
        async with turns:
            try:
                return await self.objects.stat(ref)
            except ObjectGone:
                return None

    async def _look_again_at_doubled(self, collection: _Collection, doubled: Mapping[ObjectId, VectorEntry]) -> None:
        if doubled:
            await asyncio.sleep(self.grace_seconds)
        for object_id, entry in doubled.items():
            copies = await self.vectors.page(collection.name, after=_just_before(object_id), limit=1)
            if Counter(copy.object_id for copy in copies)[object_id] > 1:
                self._report(_finding(FindingKind.DOUBLED, entry, f"{len(copies)} vectors of one object", collection))

    def _report(self, finding: Finding) -> None:
        self.totals[finding.kind] += 1
        if len(self.listed[finding.kind]) < MOST_LISTED:
            self.listed[finding.kind].append(finding)


def _just_before(object_id: ObjectId) -> ObjectId:
    return ObjectId((int.from_bytes(object_id) - 1).to_bytes(len(object_id)))
