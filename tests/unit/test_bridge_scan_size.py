"""A scan of 100,000 objects keeps ids of eight bytes and a few pages, however much it finds. Counted, not timed."""

from __future__ import annotations

import bisect
from collections.abc import AsyncIterator, Collection
from typing import Any, ClassVar

import pytest

from infra.metadata_store.interface import ImageRow
from infra.metadata_store.memory import MemoryMetadataStore
from infra.object_store.interface import ObjectStat
from infra.object_store.memory import MemoryObjectStore
from infra.vector_store.interface import VectorEntry
from infra.vector_store.memory import MemoryVectorStore
from ingest_bridge.scan_state import ScanProgress
from ingest_bridge.vector_scan import PAGE
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef, content_hash_of
from schemas.jobs import ScanArguments
from schemas.tables import RowState
from schemas.vectors import StoredVector
from tests.unit.scan_world import BUCKET, MODEL, START_US, ScanWorld

KEYS = 100_000
LOST_EVERY = 40
"""Every 40th vector is missing: 2,500 findings."""
CONTENT = content_hash_of(b"picture")


class Alive:
    """How many of what the stores handed out are still held by somebody."""

    now: ClassVar[int] = 0
    most: ClassVar[int] = 0

    @classmethod
    def count(cls, change: int) -> None:
        cls.now += change
        cls.most = max(cls.most, cls.now)


def counted(kind: type[Any]) -> type[Any]:
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        kind.__init__(self, *args, **kwargs)
        Alive.count(1)

    return type(f"Counted{kind.__name__}", (kind,), {"__init__": __init__, "__del__": lambda self: Alive.count(-1)})


CountedStat, CountedRow, CountedEntry = counted(ObjectStat), counted(ImageRow), counted(VectorEntry)

KEYS_IN_ORDER = [f"{number:06}.jpg" for number in range(KEYS)]
IDS: dict[ObjectId, str] = {}
LOST: set[ObjectId] = set()
HELD_IN_ORDER: list[ObjectId] = []


@pytest.fixture(autouse=True, scope="module")
def _many_objects() -> None:
    IDS.update((ObjectRef(BUCKET, key).object_id, key) for key in KEYS_IN_ORDER)
    LOST.update(ObjectRef(BUCKET, key).object_id for key in KEYS_IN_ORDER[::LOST_EVERY])
    HELD_IN_ORDER.extend(sorted(IDS.keys() - LOST))


class ManyObjects(MemoryObjectStore):
    async def list_pages(
        self, bucket: str, *, prefix: str = "", start_after: str | None = None
    ) -> AsyncIterator[list[ObjectStat]]:
        start = 0 if start_after is None else bisect.bisect_right(KEYS_IN_ORDER, start_after)
        for begin in range(start, KEYS, PAGE):
            yield [_stat(key) for key in KEYS_IN_ORDER[begin : begin + PAGE]]

    async def stat(self, ref: ObjectRef) -> ObjectStat:
        return _stat(ref.key)


class ManyRows(MemoryMetadataStore):
    async def rows(self, ids: Collection[ObjectId]) -> dict[ObjectId, ImageRow]:
        return {object_id: _row(IDS[object_id]) for object_id in ids}

    async def models_of(self, ids: Collection[ObjectId]) -> dict[ObjectId, dict[ModelFingerprint, ContentHash]]:
        return {object_id: {MODEL: CONTENT} for object_id in ids}

    async def list_rows(self, *, after: ObjectRef | None = None, limit: int = PAGE, **_narrow: Any) -> list[ImageRow]:
        start = 0 if after is None else bisect.bisect_right(KEYS_IN_ORDER, after.key)
        return [_row(key) for key in KEYS_IN_ORDER[start : start + limit]]

    async def counts(self, *, bucket: str | None = None, prefix: str = "") -> dict[RowState, int]:
        return {RowState.INDEXED: KEYS}


class ManyVectors(MemoryVectorStore):
    async def page(self, name: str, *, after: ObjectId | None = None, limit: int = PAGE) -> list[VectorEntry]:
        start = 0 if after is None else bisect.bisect_right(HELD_IN_ORDER, after)
        page = HELD_IN_ORDER[start : start + limit]
        return [CountedEntry(object_id, ObjectRef(BUCKET, IDS[object_id]), CONTENT) for object_id in page]

    async def fetch(self, name: str, ids: Collection[ObjectId], *, strong: bool = False) -> dict[ObjectId, StoredVector]:
        assert not set(ids) - LOST, "only what is suspected is looked at again"
        return {}

    async def count(self, name: str) -> int:
        return len(HELD_IN_ORDER)


def _stat(key: str) -> ObjectStat:
    stat: ObjectStat = CountedStat(ObjectRef(BUCKET, key), "etag", START_US, 7)
    return stat


def _row(key: str) -> ImageRow:
    row: ImageRow = CountedRow(
        ObjectRef(BUCKET, key), RowState.INDEXED, 1, 1, content_hash=CONTENT, etag="etag", put_time_us=START_US
    )
    return row


async def test_memory_is_bounded_by_pages_and_eight_bytes_an_object() -> None:
    world = ScanWorld()
    world.objects, world.metadata, world.vectors = ManyObjects(BUCKET), ManyRows(), ManyVectors()
    await world.add_model()
    scan = world.scan_with(
        "scan", ScanArguments(bucket=BUCKET), ScanProgress(), await world.broker.producer(), floor_events=500
    )
    Alive.most = Alive.now
    before = Alive.now
    await scan.run()
    progress = scan.progress
    assert (progress.listed, progress.compared, progress.removed) == (KEYS, KEYS, 0)
    assert (progress.checked, progress.to_check) == (2 * KEYS - len(LOST), 2 * KEYS - len(LOST))
    assert {event.data.ref.object_id for event in world.events()} == LOST
    assert progress.repairs == progress.written == len(LOST)
    # A page of a listing, its rows, the page before until the next one stands there; never a share of the keys.
    assert Alive.most - before <= 5 * PAGE
    assert Alive.now - before <= PAGE
