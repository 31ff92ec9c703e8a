"""Scans find what is wrong with vectors, and only that; with the real pipeline behind them all three stores agree again."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import StoreUnavailable
from infra.metadata_store.interface import RowWrite
from infra.verify import verify_stores
from ingest_bridge.backlog import Backlog
from ingest_bridge.scan import Scan
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_state import RemovalGuard, RemovalStopped, ScanFailed, ScanProgress
from schemas.events import Cause, ObjectEvent, ReasonCode
from schemas.identity import ObjectId, ObjectRef, content_hash_of
from schemas.jobs import ScanArguments
from schemas.tables import RowState
from schemas.topics import OBJECTS
from schemas.vectors import StoredVector, VectorRow
from tests.unit import world as pipeline_world
from tests.unit.scan_world import BUCKET, COLLECTION, ScanWorld, failed, ref

OTHER_BYTES = content_hash_of(b"other bytes")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.retry.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("infra.retry.LONGEST_WAIT_SECONDS", 0.0)


@pytest.fixture
async def world() -> ScanWorld:
    world = ScanWorld()
    await world.add_model()
    for number in range(5):
        await world.index(f"good {number}")
    return world


# -- what is found -----------------------------------------------------------------------------------------------------------
async def test_a_missing_vector_is_repaired(world: ScanWorld) -> None:
    await world.vectors.delete(COLLECTION, [ref("good 3").object_id])
    progress = await world.run_scan()
    assert world.in_short() == ["repair good 3"]
    assert (progress.repairs, progress.written, progress.removed) == (1, 1, 0)
    [event] = world.events()
    assert (event.data.etag, event.data.removed) == ((await world.objects.stat(ref("good 3"))).etag, False)


async def test_a_vector_of_other_bytes_behind_a_right_row_is_repaired(world: ScanWorld) -> None:
    await world.hold("good 2", OTHER_BYTES)
    await world.run_scan()
    assert world.in_short() == ["repair good 2"]


async def test_a_vector_of_nothing_is_removed(world: ScanWorld) -> None:
    await world.hold("gone", OTHER_BYTES)
    progress = await world.run_scan()
    assert world.in_short() == ["repair -gone"]
    assert (progress.repairs, progress.removed) == (1, 0)


async def test_a_vector_under_a_deleted_row_is_removed(world: ScanWorld) -> None:
    await world.index("gone")
    row = await world.row("gone")
    assert row is not None
    await world.delete("gone")
    await world.write_row(replace(row, state=RowState.DELETED, content_hash=None))
    await world.hold("gone", OTHER_BYTES)
    await world.run_scan()
    assert world.in_short() == ["repair -gone"]


async def test_a_vector_under_a_failed_row_is_repaired(world: ScanWorld) -> None:
    await world.settle(await world.put("broken"), **failed(ReasonCode.CORRUPT_IMAGE, 1))
    await world.hold("broken", OTHER_BYTES)
    await world.run_scan()
    assert world.in_short() == ["repair broken"]


async def test_an_object_that_differs_from_its_row_is_announced_once(world: ScanWorld) -> None:
    """A database that is lost leaves all vectors and no rows: to repair them would embed everything anew."""
    await world.put("new")
    await world.hold("new", content_hash_of(b"picture"))
    await world.put("good 1", b"overwritten")
    await world.hold("good 1", content_hash_of(b"overwritten"))
    progress = await world.run_scan()
    assert world.in_short() == ["scan good 1", "scan new"]
    assert progress.repairs == 0


async def test_only_the_prefix_is_looked_at(world: ScanWorld) -> None:
    for key in ("a/gone", "b/gone"):
        await world.hold(key, OTHER_BYTES)
    for key in ("a/lost", "b/lost"):
        await world.index(key)
        await world.vectors.delete(COLLECTION, [ref(key).object_id])
    await world.run_scan(prefix="a/")
    assert world.in_short() == ["repair -a/gone", "repair a/lost"]


async def test_what_another_bucket_owns_is_left(world: ScanWorld) -> None:
    other = ObjectRef("elsewhere", "gone")
    row = VectorRow(other.object_id, pipeline_world.vector_of(b"x")[:1], other, OTHER_BYTES, 0, 1, 20, 20, "JPEG")
    await world.vectors.upsert(COLLECTION, [row])
    await world.run_scan()
    assert world.in_short() == []


# -- the second look ---------------------------------------------------------------------------------------------------------
async def test_what_is_written_during_the_grace_is_no_finding(world: ScanWorld) -> None:
    """A worker had written the vector and not yet the row; another had not written the vector that its row names."""
    await world.hold("good 1", OTHER_BYTES)
    await world.vectors.delete(COLLECTION, [ref("good 2").object_id])
    sleep = world.sleep

    async def workers_go_on(seconds: float) -> None:
        await sleep(seconds)
        for key in ("good 1", "good 2"):
            await world.hold(key, content_hash_of(b"picture"))

    world.sleep = workers_go_on  # type: ignore[method-assign]  # how the workers of this test work
    await world.run_scan()
    assert world.in_short() == []


async def test_an_object_that_came_back_keeps_its_vector(world: ScanWorld) -> None:
    await world.hold("back", content_hash_of(b"picture"))
    sleep = world.sleep

    async def come_back(seconds: float) -> None:
        await sleep(seconds)
        await world.put("back")

    world.sleep = come_back  # type: ignore[method-assign]  # how the clients of this test work
    await world.run_scan()
    assert world.in_short() == []


async def test_the_second_look_sees_every_acknowledged_write(world: ScanWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.hold("good 1", OTHER_BYTES)
    looks: list[bool] = []
    fetch = world.vectors.fetch

    async def noted(name: str, ids: Collection[ObjectId], *, strong: bool = False) -> dict[ObjectId, StoredVector]:
        looks.append(strong)
        return await fetch(name, ids, strong=strong)

    monkeypatch.setattr(world.vectors, "fetch", noted)
    await world.run_scan()
    assert looks == [True]


# -- nothing is wiped by accident ----------------------------------------------------------------------------------------------
async def test_a_mass_removal_of_vectors_stops_before_the_first_event(world: ScanWorld) -> None:
    """Database and bucket both look empty, as with a wrong mount: the vectors are all that is left."""
    for number in range(30):
        await world.hold(f"left {number}", OTHER_BYTES)
    scan = await world.scan(guard=RemovalGuard(20, 0.5))
    with pytest.raises(RemovalStopped, match=r"30 of 35 vectors .* --allow-removal"):
        await scan.run()
    assert world.in_short() == []
    await (await world.scan(guard=RemovalGuard(20, 0.5), allow_removal=True)).run()
    assert len(world.in_short()) == 30


async def test_without_its_collection_a_scan_fails_and_says_what_to_do(world: ScanWorld) -> None:
    await world.vectors.drop_collection(COLLECTION)
    await world.put("new")
    with pytest.raises(ScanFailed, match="image-search upgrade"):
        await world.run_scan()
    assert world.in_short() == ["scan new"]


async def test_a_vector_store_that_stays_away_ends_the_scan_after_the_rest_was_done(
    world: ScanWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(name: str) -> bool:
        raise StoreUnavailable("milvus", "no answer")

    monkeypatch.setattr(world.vectors, "has_collection", down)
    await world.put("new")
    with pytest.raises(StoreUnavailable):
        await world.run_scan()
    assert world.in_short() == ["scan new"]


# -- whatever is broken, with the real pipeline --------------------------------------------------------------------------------
async def _scan(world: pipeline_world.World, prefix: str = "") -> ScanProgress:
    progress = ScanProgress()
    now_us = 4_000_000_000_000_000  # later than any row: what owes an outcome has been forgotten

    async def sleep(seconds: float) -> None:
        return None

    events = ScanEvents(
        "scan",
        progress,
        deployment="test",
        objects=world.objects,
        producer=world.producer,
        backlog=Backlog(world.broker, floor_events=10_000, seconds=1, commit_interval_seconds=1),
        now_us=lambda: now_us,
        sleep=sleep,
        give_up_seconds=0,
    )
    arguments = ScanArguments(bucket=BUCKET, prefix=prefix, allow_removal=True)
    scan = Scan(
        arguments,
        progress,
        events=events,
        guard=RemovalGuard(100, 0.2),
        objects=world.objects,
        metadata=world.metadata,
        vectors=world.vectors,
    )
    await scan.run()
    return progress


async def _work(world: pipeline_world.World, done: int) -> int:
    """The real pipeline takes what was written behind the first `done` events."""
    records = world.broker.records(OBJECTS)
    await world.pipeline().process([world.delivery(record.value, record.key) for record in records[done:]])
    return len(records)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20))
async def test_however_the_three_stores_disagree_a_scan_and_its_work_make_them_agree(seed: int, size: int) -> None:
    chance = random.Random(seed)
    world = await pipeline_world.World().start()
    keys = [f"{chance.choice(['', 'a/', 'ä '])}{number}" for number in range(size)]
    await world.pipeline().process([await world.put(key, _bytes(chance)) for key in keys])
    for key in keys:
        for _ in range(chance.randint(0, 2)):
            await _break(world, chance, key)
    await _scan(world)
    done = await _work(world, 0)
    report = await verify_stores(world.objects, world.metadata, world.vectors, buckets=[BUCKET], grace_seconds=0)
    assert report.clean, report.to_json()
    await _scan(world)
    assert await _work(world, done) == done, "the next scan found something although verify did not"


def _bytes(chance: random.Random) -> bytes:
    return chance.choice([b"one", b"two", b"broken", b"", b"%d" % chance.randint(0, 9)])


async def _break(world: pipeline_world.World, chance: random.Random, key: str) -> None:
    at, object_id = ObjectRef(BUCKET, key), ObjectRef(BUCKET, key).object_id
    row = await world.row(key)
    match chance.randint(0, 7):
        case 0:
            await world.vectors.delete(pipeline_world.COLLECTION, [object_id])
        case 1:
            data = _bytes(chance)
            wrong = VectorRow(object_id, pipeline_world.vector_of(b"w"), at, content_hash_of(data), 0, 1, 40, 30, "JPEG")
            await world.vectors.upsert(pipeline_world.COLLECTION, [wrong])
        case 2:
            world.metadata._images.pop(object_id, None)
            world.metadata._image_models.pop(object_id, None)
        case 3:
            world.metadata._image_models.pop(object_id, None)
        case 4:
            await world.objects.delete(at)
        case 5:
            await world.objects.put(at, _bytes(chance) + b"!")
        case 6 if row is not None:
            unpublished = replace(row, generation=row.generation + 1)
            await world.metadata.write([RowWrite(unpublished, row.generation, frozenset({pipeline_world.MODEL}))])
        case _ if row is not None:
            deleted = replace(row, state=RowState.DELETED, content_hash=None, generation=row.generation + 1)
            deleted = replace(deleted, published_generation=deleted.generation)
            await world.metadata.write([RowWrite(deleted, row.generation)])


async def test_a_vector_left_behind_by_an_evicted_worker_is_found() -> None:
    """It read the old bytes, stalled, lost its partitions, wrote its vector after all, and died before the fence."""
    world = await pipeline_world.World().start()
    old = await world.put("a.jpg", b"old")

    class Died(BaseException):
        pass

    async def stall_then_die(step: int) -> None:
        if step == 7:
            await world.pipeline().process([await world.put("a.jpg", b"new")])
        if step == 8:
            raise Died

    with pytest.raises(Died):
        await world.pipeline(stall_then_die).process([old])
    row = await world.row("a.jpg")
    assert row is not None
    assert row.content_hash == content_hash_of(b"new")
    assert await world.vector_content("a.jpg") == content_hash_of(b"old")
    await _scan(world)
    assert [event.data.cause for event in _events(world)] == [Cause.REPAIR]
    await _work(world, 0)
    assert await world.vector_content("a.jpg") == content_hash_of(b"new")


def _events(world: pipeline_world.World) -> Sequence[ObjectEvent]:
    return [ObjectEvent.model_validate_json(record.value) for record in world.broker.records(OBJECTS)]
