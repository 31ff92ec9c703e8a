"""verify finds each way in which the three stores can disagree, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from infra.errors import StoreRefused
from infra.metadata_store import MemoryMetadataStore
from infra.metadata_store.interface import ImageRow, ModelRow, RowWrite
from infra.object_store.memory import MemoryObjectStore
from infra.vector_store import MemoryVectorStore
from infra.vector_store.interface import VectorEntry
from infra.verify import MOST_LISTED, FindingKind, Report, verify_stores
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef, content_hash_of
from schemas.tables import ModelState, RowState
from schemas.vectors import VectorRow

BUCKET = "images"
ACTIVE = ModelFingerprint("a" * 64)
FILLING = ModelFingerprint("f" * 64)
OTHER_BYTES = content_hash_of(b"something else")


class DoublingVectorStore(MemoryVectorStore):
    """Shows some objects twice, as a server does that was given one id twice in one upsert."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled: set[ObjectId] = set()

    async def page(self, name: str, *, after: ObjectId | None = None, limit: int = 1000) -> list[VectorEntry]:
        entries = await super().page(name, after=after, limit=limit)
        return [entry for entry in entries for _ in range(2 if entry.object_id in self.doubled else 1)]


@dataclass
class World:
    objects: MemoryObjectStore = field(default_factory=lambda: MemoryObjectStore(BUCKET))
    metadata: MemoryMetadataStore = field(default_factory=MemoryMetadataStore)
    vectors: DoublingVectorStore = field(default_factory=DoublingVectorStore)

    async def add_model(self, fingerprint: ModelFingerprint, state: ModelState) -> None:
        await self.metadata.add_model(ModelRow(fingerprint, "m", f"c_{fingerprint}", 4, "openvino", "fp32", {}, state, 1))
        await self.vectors.create_collection(f"c_{fingerprint}", dimension=4)

    async def add_picture(self, key: str, data: bytes = b"picture") -> ObjectRef:
        ref = ObjectRef(BUCKET, key)
        stat = await self.objects.put(ref, data)
        await self.write(ref, RowState.INDEXED, etag=stat.etag, content_hash=content_hash_of(data))
        await self.add_vector(ref, content_hash_of(data))
        return ref

    async def write(
        self,
        ref: ObjectRef,
        state: RowState,
        *,
        etag: str | None = None,
        content_hash: ContentHash | None = None,
        models: frozenset[ModelFingerprint] = frozenset({ACTIVE}),
        published: bool = True,
    ) -> None:
        seen = (await self.metadata.rows([ref.object_id])).get(ref.object_id)
        generation = (seen.generation if seen else 0) + 1
        row = ImageRow(ref, state, generation, published_generation=0, etag=etag, content_hash=content_hash)
        await self.metadata.write([RowWrite(row, generation - 1, models)])
        if published:
            await self.metadata.mark_published({ref.object_id: generation})

    async def add_vector(self, ref: ObjectRef, content_hash: ContentHash, fingerprint: ModelFingerprint = ACTIVE) -> None:
        vector = np.array([1, 0, 0, 0], dtype=np.float32)
        await self.vectors.upsert(f"c_{fingerprint}", [VectorRow(ref.object_id, vector, ref, content_hash, 1, 1, 1, 1, "jpeg")])

    async def remove_vector(self, ref: ObjectRef) -> None:
        await self.vectors.delete(f"c_{ACTIVE}", [ref.object_id])

    async def verify(self, prefix: str = "") -> Report:
        return await verify_stores(self.objects, self.metadata, self.vectors, buckets=[BUCKET], prefix=prefix, grace_seconds=0)


@pytest.fixture
async def world() -> World:
    world = World()
    await world.add_model(ACTIVE, ModelState.ACTIVE)
    for number in range(3):
        await world.add_picture(f"good-{number}.jpg", b"%d" % number)
    return world


def found(report: Report) -> dict[str, list[str]]:
    """Keys by kind of finding; what has none is left out."""
    return {kind.value: [item.key for item in those.listed] for kind, those in report.findings.items() if those.total}


async def test_three_stores_that_agree_are_clean_and_counted(world: World) -> None:
    await world.write(ObjectRef(BUCKET, "gone.jpg"), RowState.DELETED)
    report = await world.verify()
    assert report.clean
    assert report.objects == 3
    assert report.rows == {"indexed": 3, "deleted": 1}
    assert report.vectors == {f"c_{ACTIVE}": 3}


async def test_settled_objects_without_vectors_are_clean(world: World) -> None:
    ignored = await world.objects.put(ObjectRef(BUCKET, "notes.txt"), b"text")
    await world.write(ignored.ref, RowState.IGNORED)
    failed = await world.objects.put(ObjectRef(BUCKET, "broken.jpg"), b"broken")
    await world.write(failed.ref, RowState.FAILED, etag=failed.etag)
    await world.objects.put(ObjectRef(BUCKET, "folder/"), b"")
    assert found(await world.verify()) == {}


Harm = Callable[[World, ObjectRef], Awaitable[object]]


async def _deleted_by_mistake(world: World, ref: ObjectRef) -> None:
    await world.write(ref, RowState.DELETED)
    await world.remove_vector(ref)


async def _doubled(world: World, ref: ObjectRef) -> None:
    world.vectors.doubled.add(ref.object_id)


async def _owing(world: World, ref: ObjectRef) -> None:
    row = (await world.metadata.rows([ref.object_id]))[ref.object_id]
    await world.write(ref, RowState.INDEXED, etag=row.etag, content_hash=row.content_hash, published=False)


HARMS: dict[str, tuple[str, Harm]] = {
    "no row": (FindingKind.MISSING, lambda world, ref: world.objects.put(ObjectRef(BUCKET, ref.key + ".new"), b"new")),
    "row deleted": (FindingKind.MISSING, _deleted_by_mistake),
    "no vector": (FindingKind.MISSING, lambda world, ref: world.remove_vector(ref)),
    "object gone": (FindingKind.GHOST, lambda world, ref: world.objects.delete(ref)),
    "vector without row": (
        FindingKind.GHOST,
        lambda world, ref: world.add_vector(ObjectRef(BUCKET, ref.key + ".x"), OTHER_BYTES),
    ),
    "overwritten": (FindingKind.STALE, lambda world, ref: world.objects.put(ref, b"overwritten")),
    "doubled": (FindingKind.DOUBLED, _doubled),
    "vector of other bytes": (FindingKind.WRONG_VECTOR, lambda world, ref: world.add_vector(ref, OTHER_BYTES)),
    "outcome owed": (FindingKind.UNPUBLISHED, _owing),
}


@pytest.mark.parametrize("harm", HARMS)
async def test_each_disagreement_is_found_once_and_only_itself(world: World, harm: str) -> None:
    kind, do_harm = HARMS[harm]
    ref = await world.add_picture("harmed.jpg")
    await do_harm(world, ref)
    report = await world.verify()
    assert not report.clean
    assert {name: len(keys) for name, keys in found(report).items()} == {kind: 1}
    assert all(key.startswith("harmed.jpg") for keys in found(report).values() for key in keys)


async def test_a_failed_row_must_not_keep_its_old_vector(world: World) -> None:
    ref = await world.add_picture("broken-later.jpg")
    stat = await world.objects.put(ref, b"broken")
    await world.write(ref, RowState.FAILED, etag=stat.etag)
    assert found(await world.verify()) == {"ghost": ["broken-later.jpg"]}


@pytest.mark.parametrize("suspects_at_once", [1, 1000])
async def test_an_object_that_is_wrong_in_two_ways_is_reported_for_both_once(
    world: World, monkeypatch: pytest.MonkeyPatch, suspects_at_once: int
) -> None:
    monkeypatch.setattr("infra.verify.SUSPECTS_AT_ONCE", suspects_at_once)
    ref = await world.add_picture("harmed.jpg")
    await world.objects.put(ref, b"overwritten")
    await world.add_vector(ref, OTHER_BYTES)
    assert found(await world.verify()) == {"stale": ["harmed.jpg"], "wrong_vector": ["harmed.jpg"]}


async def test_a_filling_model_need_not_have_every_vector_but_those_that_rows_claim(world: World) -> None:
    await world.add_model(FILLING, ModelState.FILLING)
    assert (await world.verify()).clean
    stat = await world.objects.put(ObjectRef(BUCKET, "claimed.jpg"), b"claimed")
    content_hash = content_hash_of(b"claimed")
    both = frozenset({ACTIVE, FILLING})
    await world.write(stat.ref, RowState.INDEXED, etag=stat.etag, content_hash=content_hash, models=both)
    await world.add_vector(stat.ref, content_hash)
    (missing,) = (await world.verify()).findings[FindingKind.MISSING].listed
    assert (missing.key, missing.collection) == ("claimed.jpg", f"c_{FILLING}")


async def test_what_is_put_right_within_the_grace_is_no_finding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    late = await world.objects.put(ObjectRef(BUCKET, "late.jpg"), b"late")
    waited = []

    async def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        await world.add_picture(late.ref.key, b"late")

    monkeypatch.setattr(asyncio, "sleep", meanwhile)
    assert found(await world.verify()) == {}
    assert waited == [0]


async def test_only_the_prefix_is_looked_at(world: World) -> None:
    for folder in ("a/", "b/"):
        await world.objects.put(ObjectRef(BUCKET, f"{folder}new.jpg"), b"new")
        await world.add_vector(ObjectRef(BUCKET, f"{folder}ghost.jpg"), OTHER_BYTES)
    report = await world.verify(prefix="a/")
    assert found(report) == {"missing": ["a/new.jpg"], "ghost": ["a/ghost.jpg"]}
    assert report.objects == 1


async def test_a_missing_bucket_is_a_fault_and_not_an_empty_bucket(world: World) -> None:
    with pytest.raises(StoreRefused):
        await verify_stores(world.objects, world.metadata, world.vectors, buckets=["nowhere"], grace_seconds=0)


async def test_many_findings_are_all_counted_and_the_first_thousand_listed(world: World) -> None:
    number = 2 * MOST_LISTED + 5
    for index in range(number):
        await world.objects.put(ObjectRef(BUCKET, f"new-{index:05}.jpg"), b"new")
    missing = (await world.verify()).findings[FindingKind.MISSING]
    assert (missing.total, len(missing.listed)) == (number, MOST_LISTED)


async def test_the_report_can_be_read_as_json(world: World) -> None:
    await world.objects.put(ObjectRef(BUCKET, "new.jpg"), b"new")
    report = json.loads((await world.verify()).to_json())
    assert report["clean"] is False
    assert report["objects"] == 4
    assert report["findings"]["missing"]["total"] == 1
    assert report["findings"]["missing"]["listed"][0]["key"] == "new.jpg"
    assert set(report["findings"]) == {kind.value for kind in FindingKind}


async def test_progress_is_heard_for_each_store(world: World) -> None:
    heard: list[tuple[str, int]] = []
    await verify_stores(
        world.objects,
        world.metadata,
        world.vectors,
        buckets=[BUCKET],
        progress=lambda what, number: heard.append((what, number)),
        grace_seconds=0,
    )
    assert heard == [("vectors", 3), ("objects", 3), ("rows", 3)]
