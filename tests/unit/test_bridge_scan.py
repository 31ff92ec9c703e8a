"""Scans over the twins: every difference, the guard against mass removal, faults, pacing, and going on after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ObjectGone, StoreRefused, StoreUnavailable
from infra.kafka.memory import Operation as BrokerOperation
from infra.object_store.memory import Operation
from ingest_bridge.object_id_set import ObjectIdSet
from ingest_bridge.scan_state import RemovalGuard, RemovalStopped, ScanFailed, ScanPhase, ScanProgress
from schemas.events import Cause, ReasonCode
from schemas.identity import RESERVED_PREFIX, ModelFingerprint, ObjectId
from schemas.tables import ModelState, RowState
from schemas.topics import OBJECTS, Topic
from tests.unit.scan_world import BUCKET, MODEL, OLD_US, SECOND_US, START_US, ScanWorld, failed, ref


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.retry.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("infra.retry.LONGEST_WAIT_SECONDS", 0.0)


@pytest.fixture
async def world() -> ScanWorld:
    world = ScanWorld()
    await world.add_model()
    return world


# -- what differs ----------------------------------------------------------------------------------------------------------
async def test_what_was_in_the_bucket_before_is_taken_in(world: ScanWorld) -> None:
    for number in range(10):
        await world.put(f"{number}.jpg")
    progress = await world.run_scan()
    assert world.in_short() == [f"scan {number}.jpg" for number in range(10)]
    assert (progress.listed, progress.compared, progress.written, progress.removed) == (10, 10, 10, 0)
    assert progress.phase is ScanPhase.DONE


async def test_our_own_objects_are_no_pictures(world: ScanWorld) -> None:
    """A page may hold nothing else."""
    for key in ("canary/1", "canary/2", "canary/3", "canary/4"):
        await world.put(f"{RESERVED_PREFIX}{key}")
    await world.put("a.jpg")
    progress = await world.run_scan()
    assert world.in_short() == ["scan a.jpg"]
    assert (progress.listed, progress.compared) == (1, 1)


async def test_an_index_that_agrees_gets_no_event(world: ScanWorld) -> None:
    for number in range(10):
        await world.index(f"{number}.jpg")
    progress = await world.run_scan()
    assert world.in_short() == []
    assert progress.compared == 10


async def test_the_event_describes_the_object_as_listed(world: ScanWorld) -> None:
    stat = await world.put("a b.jpg", b"some bytes")
    await world.run_scan()
    [event] = world.events()
    assert (event.data.etag, event.data.size) == (stat.etag, 10)
    assert event.data.put_time is not None
    assert round(event.data.put_time.timestamp() * SECOND_US) == stat.put_time_us
    [record] = world.broker.records(OBJECTS)
    assert record.key == b"images/a b.jpg"


@pytest.mark.parametrize(
    "changes",
    [
        {"etag": "another"},
        {"put_time_us": START_US - SECOND_US},
        {"put_time_us": None},
        {"state": RowState.DELETED, "content_hash": None},
    ],
    ids=str,
)
async def test_a_row_of_another_object_gets_a_scan_event(world: ScanWorld, changes: dict[str, Any]) -> None:
    await world.settle(await world.put("a"), **changes)
    await world.run_scan()
    assert world.in_short() == ["scan a"]


async def test_times_compare_in_whole_seconds(world: ScanWorld) -> None:
    stat = await world.put("a")
    await world.settle(stat, put_time_us=stat.put_time_us + 999_999)
    await world.run_scan()
    assert world.in_short() == []


async def test_a_failure_that_may_pass_is_tried_again_up_to_a_limit(world: ScanWorld) -> None:
    await world.settle(await world.put("first"), **failed(ReasonCode.OBJECT_UNREADABLE, 1))
    await world.settle(await world.put("fourth"), **failed(ReasonCode.DECODE_TIMEOUT, 4))
    await world.settle(await world.put("fifth"), **failed(ReasonCode.INTERNAL_ERROR, 5))
    await world.settle(await world.put("broken"), **failed(ReasonCode.CORRUPT_IMAGE, 1))
    await world.settle(await world.put("ignored"), state=RowState.IGNORED, content_hash=None)
    await world.run_scan()
    assert {event.data.key: event.data.attempt for event in world.events()} == {"first": 2, "fourth": 5}
    assert {event.data.cause for event in world.events()} == {Cause.RETRY}


@pytest.mark.parametrize("state", [ModelState.FILLING, ModelState.PREVIOUS])
async def test_what_only_another_model_lacks_is_brought_to_it_quietly(world: ScanWorld, state: ModelState) -> None:
    other = ModelFingerprint("e" * 64)
    await world.add_model(other, state)
    await world.index("lacks")
    stat = await world.put("has")
    await world.settle(stat)
    row = await world.row("has")
    assert row is not None
    await world.write_row(row, frozenset({MODEL, other}))
    await world.run_scan()
    assert world.in_short() == ["scan lacks"]


async def test_a_dropped_model_needs_nothing(world: ScanWorld) -> None:
    await world.add_model(ModelFingerprint("e" * 64), ModelState.DROPPED)
    await world.index("a")
    await world.run_scan()
    assert world.in_short() == []


async def test_a_vector_of_other_bytes_gets_a_repair(world: ScanWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.index("a")

    async def of_other_bytes(ids: list[ObjectId]) -> dict[ObjectId, dict[ModelFingerprint, bytes]]:
        return {object_id: {MODEL: b"x" * 32} for object_id in ids}

    monkeypatch.setattr(world.metadata, "models_of", of_other_bytes)
    await world.run_scan()
    assert world.in_short() == ["repair a"]


async def test_outcomes_owed_for_a_minute_are_reminded_of(world: ScanWorld) -> None:
    await world.settle(await world.put("old"), published_generation=0, updated_at_us=OLD_US)
    await world.settle(await world.put("now"), published_generation=0)
    gone = await world.put("gone")
    await world.delete("gone")
    await world.settle(gone, state=RowState.DELETED, content_hash=None, published_generation=0, updated_at_us=OLD_US)
    await world.run_scan()
    assert world.in_short() == ["repair -gone", "repair old"]


async def test_a_directory_marker_is_told_as_one(world: ScanWorld) -> None:
    await world.put("folder/", b"")
    await world.run_scan()
    assert [event.data.directory_marker for event in world.events()] == [True]


async def test_a_prefix_bounds_everything(world: ScanWorld) -> None:
    for key in ("in/new", "out/new"):
        await world.put(key)
    for key in ("in/gone", "out/gone"):
        await world.index(key)
        await world.delete(key)
    for key in ("in/owing", "out/owing"):
        await world.settle(await world.put(key), published_generation=0, updated_at_us=OLD_US)
    progress = await world.run_scan(prefix="in/")
    assert {event.data.key for event in world.events()} == {"in/new", "in/gone", "in/owing"}
    assert progress.listed == 2


async def test_a_key_that_no_event_can_carry_is_counted_and_left(world: ScanWorld) -> None:
    stat = await world.put("a")
    await world.put("b")

    async def lengthen(operation: Operation, bucket: str, key: str | None) -> None:
        # A filer that is written to by other ways than S3 has such keys; the twin would refuse them.
        inside = world.objects._buckets[BUCKET]
        stored = inside.pop("a", None)
        if stored:
            inside["a" * 1025] = replace(stored, stat=replace(stat, ref=ref("a" * 1025)))

    world.objects.before_call = lengthen
    progress = await world.run_scan()
    assert world.in_short() == ["scan b"]
    assert progress.unnameable == 1


# -- what is gone ----------------------------------------------------------------------------------------------------------
async def test_objects_that_are_gone_are_removed(world: ScanWorld) -> None:
    for key in ("stays", "gone", "gone too"):
        await world.index(key)
    await world.delete("gone")
    await world.delete("gone too")
    progress = await world.run_scan()
    assert world.in_short() == ["scan -gone", "scan -gone too"]
    assert progress.removed == 2


async def test_rows_deleted_before_are_not_removed_again(world: ScanWorld) -> None:
    await world.index("gone")
    await world.delete("gone")
    await world.run_scan()
    await world.work(world.events())
    await world.run_scan(scan_id="scan-2")
    assert world.in_short() == ["scan -gone"]


async def test_an_object_that_came_back_meanwhile_is_not_removed(world: ScanWorld) -> None:
    await world.index("back")
    await world.delete("back")

    async def come_back(operation: Operation, bucket: str, key: str | None) -> None:
        if operation is Operation.STAT:
            world.objects.before_call = quiet
            await world.put("back", b"other bytes")

    world.objects.before_call = come_back
    progress = await world.run_scan()
    assert world.in_short() == ["scan back"]
    assert progress.removed == 0


async def quiet(operation: Operation, bucket: str, key: str | None) -> None:
    return None


@pytest.mark.parametrize(
    "fault",
    [
        StoreRefused(ReasonCode.BUCKET_NOT_FOUND, "the bucket 'images' is missing"),
        StoreRefused(ReasonCode.ACCESS_DENIED, "access is denied"),
    ],
    ids=str,
)
@pytest.mark.parametrize("broken", [Operation.LIST, Operation.STAT])
async def test_a_store_that_refuses_ends_the_scan_and_removes_nothing(
    world: ScanWorld, fault: StoreRefused, broken: Operation
) -> None:
    for number in range(5):
        await world.index(f"{number}")
        await world.delete(f"{number}")

    async def refuse(operation: Operation, bucket: str, key: str | None) -> None:
        if operation is broken:
            raise fault

    world.objects.before_call = refuse
    scan = await world.scan()
    with pytest.raises(ScanFailed, match=str(fault)):
        await scan.run()
    assert world.in_short() == []


@pytest.mark.parametrize("broken", [Operation.LIST, Operation.STAT])
async def test_a_store_that_stays_away_ends_the_scan_and_removes_nothing(world: ScanWorld, broken: Operation) -> None:
    await world.index("a")
    await world.delete("a")

    async def away(operation: Operation, bucket: str, key: str | None) -> None:
        if operation is broken:
            raise StoreUnavailable("object store", "away")

    world.objects.before_call = away
    scan = await world.scan()
    with pytest.raises(StoreUnavailable):
        await scan.run()
    assert world.in_short() == []


async def test_a_store_that_comes_back_is_waited_for(world: ScanWorld) -> None:
    for number in range(10):
        await world.put(f"{number}")
    await world.index("gone")
    await world.delete("gone")
    calls = 0

    async def every_other_fails(operation: Operation, bucket: str, key: str | None) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise StoreUnavailable("object store", "away")

    async def broker_fails_too(operation: BrokerOperation, topic: Topic | None) -> None:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise StoreUnavailable("broker", "away")

    world.objects.before_call = every_other_fails
    world.broker.before_call = broker_fails_too
    await world.run_scan()
    world.broker.before_call = lambda operation, topic: quiet(Operation.CHECK, "", None)
    assert world.in_short() == ["scan -gone", *(f"scan {number}" for number in range(10))]


# -- the guard -------------------------------------------------------------------------------------------------------------
async def bucket_with(world: ScanWorld, *, gone: int, present: int) -> None:
    for number in range(gone):
        await world.index(f"gone {number:04}")
        await world.delete(f"gone {number:04}")
    for number in range(present):
        await world.index(f"present {number:04}")


async def test_a_mass_removal_stops_before_the_first_event(world: ScanWorld) -> None:
    await bucket_with(world, gone=101, present=10)
    scan = await world.scan()
    with pytest.raises(RemovalStopped) as stopped:
        await scan.run()
    assert world.in_short() == []
    message = str(stopped.value)
    assert "101 of 111" in message
    assert "image-search scan --bucket images --allow-removal" in message


async def test_an_emptied_bucket_costs_no_request_an_object(world: ScanWorld) -> None:
    await bucket_with(world, gone=3000, present=0)
    stats = 0

    async def count(operation: Operation, bucket: str, key: str | None) -> None:
        nonlocal stats
        stats += operation is Operation.STAT

    world.objects.before_call = count
    scan = await world.scan()
    with pytest.raises(RemovalStopped, match="3000 of 3000"):
        await scan.run()
    assert stats < 2000


async def test_allowed_it_removes_them_all(world: ScanWorld) -> None:
    await bucket_with(world, gone=150, present=10)
    progress = await world.run_scan(allow_removal=True)
    assert progress.removed == 150
    assert len([event for event in world.events() if event.data.removed]) == 150


@pytest.mark.parametrize(("gone", "present"), [(100, 0), (101, 404)])
async def test_at_either_limit_it_goes_on(world: ScanWorld, gone: int, present: int) -> None:
    await bucket_with(world, gone=gone, present=present)
    assert (await world.run_scan()).removed == gone


async def test_above_both_limits_it_stops(world: ScanWorld) -> None:
    await bucket_with(world, gone=101, present=403)
    with pytest.raises(RemovalStopped):
        await world.run_scan()


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 500), st.floats(0, 1))
def test_the_guard_needs_both_limits(removals: int, rows: int, limit: int, share: float) -> None:
    assert RemovalGuard(limit, share).forbids(removals, rows) == (removals > limit and removals > share * rows)


# -- going on, pacing ------------------------------------------------------------------------------------------------------
async def test_killed_at_any_moment_it_goes_on_where_it_was(world: ScanWorld) -> None:
    for number in range(20):
        await world.put(f"{number:02}")
    await world.index("gone")
    await world.delete("gone")
    kept: ScanProgress | None = None

    async def die_at_the_third_send(operation: BrokerOperation, topic: Topic | None) -> None:
        if operation is BrokerOperation.SEND and len(world.broker.records(OBJECTS)) >= 6:
            raise asyncio.CancelledError

    world.broker.before_call = die_at_the_third_send
    first = await world.scan()
    with contextlib.suppress(asyncio.CancelledError):
        await first.run()
    kept = ScanProgress.model_validate_json(first.progress.model_dump_json())
    assert (kept.last_key, kept.compared, kept.listed) == ("05", 6, 20)

    world.broker.before_call = lambda operation, topic: quiet(Operation.CHECK, "", None)
    second = await world.scan(progress=kept)
    await second.run()
    assert world.in_short() == ["scan -gone", *(f"scan {number:02}" for number in range(20))]
    assert (second.progress.compared, second.progress.listed) == (20, 20)


async def test_a_page_written_twice_repeats_its_ids(world: ScanWorld) -> None:
    await world.put("a")
    await world.run_scan()
    await world.run_scan()
    await world.run_scan(scan_id="another")
    ids = [event.id for event in world.events()]
    assert ids[0] == ids[1] != ids[2]


async def test_it_never_has_more_outstanding_than_allowed_while_nothing_is_known_of_the_workers(world: ScanWorld) -> None:
    for number in range(300):
        await world.put(f"{number:03}")
    seen = []

    async def no_workers_at_first(seconds: float) -> None:
        world.slept += 1
        seen.append((await world.pending(), scan.progress.written, scan.progress.waiting_for_workers))
        if world.slept > 50:
            await world.commit_all()

    world.sleep = no_workers_at_first  # type: ignore[method-assign]  # how the workers of this test work
    scan = await world.scan(floor_events=10)
    await scan.run()
    assert seen[:50] == [(10, 10, True)] * 50
    assert scan.progress.written == 300
    assert not scan.progress.waiting_for_workers


async def test_the_allowance_follows_the_rate_of_the_workers(world: ScanWorld) -> None:
    """Workers that take 20 events in each interval are given two intervals' worth: one outstanding, one uncommitted."""
    for number in range(400):
        await world.put(f"{number:03}")
    most = 0

    async def slow_workers(seconds: float) -> None:
        nonlocal most
        world.slept += 1
        most = max(most, await world.pending())
        left = 20
        for lag in await world.broker.lag(OBJECTS, "processors"):
            taken = min(left, lag.pending)
            left -= taken
            world.broker.commit(OBJECTS, "processors", {lag.partition: max(lag.committed, lag.begin) + taken})

    world.sleep = slow_workers  # type: ignore[method-assign]  # how the workers of this test work
    scan = await world.scan(floor_events=5)
    await scan.run()
    assert scan.progress.written == 400
    assert 30 <= most <= 40


async def test_an_estimate_is_given(world: ScanWorld) -> None:
    for number in range(9):
        await world.put(str(number))
    scan = await world.scan()
    estimates = []

    async def note(operation: Operation, bucket: str, key: str | None) -> None:
        estimates.append((scan.progress.phase, scan.progress.eta_seconds))

    world.objects.before_call = note
    await scan.run()
    assert any(phase is ScanPhase.COMPARING and eta is not None for phase, eta in estimates)
    assert scan.progress.eta_seconds == 0


# -- whatever the difference -----------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 25), st.integers(1, 7))
async def test_after_a_scan_and_the_work_it_asked_for_index_and_bucket_agree(seed: int, size: int, page_size: int) -> None:
    chance = random.Random(seed)
    world = ScanWorld(page_size=page_size)
    await world.add_model()
    for number in range(size):
        await _disturb(world, chance, f"{chance.choice(['', 'a/', 'ä/'])}{number}")
    await world.run_scan(allow_removal=True)
    await world.work(world.events())
    assert await world.index_equals_bucket()
    written = len(world.events())
    await world.run_scan(scan_id="again")
    assert len(world.events()) == written


async def _disturb(world: ScanWorld, chance: random.Random, key: str) -> None:
    kind = chance.choice(["agrees", "new", "overwritten", "deleted", "failed", "unpublished", "no vector", "back", "nothing"])
    if kind == "nothing":
        return
    stat = await world.put(key)
    if kind in ("agrees", "overwritten", "deleted"):
        await world.settle(stat)
    if kind == "overwritten":
        world.now_us += SECOND_US
        await world.put(key, b"new bytes")
    elif kind == "deleted":
        await world.delete(key)
    elif kind == "failed":
        await world.settle(stat, **failed(ReasonCode.OBJECT_UNREADABLE, chance.randint(1, 4)))
    elif kind == "unpublished":
        await world.settle(stat, published_generation=0, updated_at_us=OLD_US)
    elif kind == "back":
        await world.settle(stat, state=RowState.DELETED, content_hash=None)
    elif kind == "no vector":
        await world.settle(stat)
        row = await world.row(key)
        assert row is not None
        await world.write_row(row, frozenset())


# -- the set of listed objects ---------------------------------------------------------------------------------------------
@given(st.sets(st.binary(min_size=32, max_size=32)), st.sets(st.binary(min_size=32, max_size=32)))
def test_the_set_knows_what_was_added(inside: set[bytes], outside: set[bytes]) -> None:
    listed = ObjectIdSet()
    listed.add(ObjectId(one) for one in inside)
    asked = [*inside, *(outside - inside)]
    assert len(listed) == len(inside)
    assert listed.has(ObjectId(one) for one in asked) == [one in inside for one in asked]
    listed.add(ObjectId(one) for one in outside)
    assert all(listed.has(ObjectId(one) for one in asked))


async def test_the_twin_forgets_what_is_deleted(world: ScanWorld) -> None:
    """The tests above rest on it."""
    await world.index("a")
    await world.delete("a")
    with pytest.raises(ObjectGone):
        await world.objects.stat(ref("a"))
