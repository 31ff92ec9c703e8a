"""A crash after any step, two writers of one key, and any order of both: the bucket's state is what remains."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.verify import verify_stores
from processors.work import Delivery, PartitionsRevoked
from schemas.events import OutcomeType
from schemas.identity import ObjectRef, content_hash_of
from schemas.tables import RowState
from tests.unit.world import BROKEN, BUCKET, COLLECTION, World

STEPS = range(1, 11)


class Killed(BaseException):
    """As SIGKILL: nothing of ours may catch it."""


@dataclass
class KillAfter:
    step: int
    bit: bool = False

    async def __call__(self, step: int) -> None:
        if step == self.step and not self.bit:
            self.bit = True
            raise Killed


async def deliver_until_done(world: World, batch: list[Delivery], step: int) -> None:
    kill = KillAfter(step)
    with pytest.raises(Killed):
        await world.pipeline(kill).process(batch)
    assert kill.bit
    await world.pipeline().process(batch)


async def assert_equal_to_bucket(world: World) -> None:
    """Every object is indexed or failed with its own bytes, what is gone is gone, and nobody is owed an outcome."""
    report = await verify_stores(world.objects, world.metadata, world.vectors, buckets=[BUCKET], grace_seconds=0)
    assert report.clean, report.to_json()
    assert await world.metadata.unpublished() == []


@pytest.mark.parametrize("step", STEPS)
async def test_a_crash_after_a_step_loses_and_doubles_nothing(step: int) -> None:
    world = await World().start()
    await world.pipeline().process([await world.put(key, key.encode()) for key in ("old.jpg", "gone.jpg", "spoilt.jpg")])
    batch = [
        await world.put("new.jpg", b"new"),
        await world.put("copy.jpg", b"new"),
        await world.put("old.jpg", b"changed"),
        await world.put("spoilt.jpg", BROKEN),
        await world.remove("gone.jpg"),
        world.delivery(b"not json"),
    ]
    await deliver_until_done(world, batch, step)
    await assert_equal_to_bucket(world)
    told = Counter((one.data.key, one.type) for one in {one.id: one for one in await world.outcomes()}.values())
    assert told == {
        ("old.jpg", OutcomeType.INDEXED): 1,
        ("gone.jpg", OutcomeType.INDEXED): 1,
        ("spoilt.jpg", OutcomeType.INDEXED): 1,
        ("new.jpg", OutcomeType.INDEXED): 1,
        ("copy.jpg", OutcomeType.INDEXED): 1,
        ("copy.jpg", OutcomeType.DUPLICATE): 1,
        ("old.jpg", OutcomeType.UPDATED): 1,
        ("spoilt.jpg", OutcomeType.FAILED): 1,
        ("gone.jpg", OutcomeType.DELETED): 1,
    }
    identities = {
        (letter.headers["image-search-partition"], letter.headers["image-search-offset"])
        for letter in await world.dead_letters()
    }
    assert len(identities) == 2


@pytest.mark.parametrize("step", range(1, 11))
async def test_a_batch_whose_partitions_are_taken_away_is_dropped_whole_or_written_whole(step: int) -> None:
    world = await World().start()
    batch = [await world.put("a.jpg", b"one"), await world.put("b.jpg", b"two")]
    reached: list[int] = []

    async def note(number: int) -> None:
        reached.append(number)

    pipeline = world.pipeline(note)
    if step < 8:
        with pytest.raises(PartitionsRevoked):
            await pipeline.process(batch, lambda: step not in reached)
        assert await world.vectors.count(COLLECTION) == 0
        assert await world.row("a.jpg") is None
        await world.pipeline().process(batch)
    else:
        await pipeline.process(batch, lambda: step not in reached)
    await assert_equal_to_bucket(world)


async def test_an_outcome_owed_since_a_crash_is_paid_before_the_object_changes_again() -> None:
    world = await World().start()
    first = await world.put("a.jpg", b"one")
    with pytest.raises(Killed):
        await world.pipeline(KillAfter(9)).process([first])
    second = await world.put("a.jpg", b"two")
    await world.pipeline().process([first, second])
    assert [outcome.type for outcome in await world.outcomes()] == [OutcomeType.INDEXED, OutcomeType.UPDATED]
    await assert_equal_to_bucket(world)


class Stalled:
    """A worker that stands still after a step until it is let go: a long pause, a lost group membership."""

    def __init__(self, step: int) -> None:
        self.step, self.reached, self.go_on = step, asyncio.Event(), asyncio.Event()

    async def __call__(self, step: int) -> None:
        if step == self.step and not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()


@pytest.mark.parametrize("step", [3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("second", ["overwrite", "delete", "break"])
async def test_two_writers_of_one_key_end_as_the_bucket_says(step: int, second: str) -> None:
    world = await World().start()
    slow = await world.put("a.jpg", b"one")
    stalled = Stalled(step)
    first: asyncio.Task[None] = asyncio.create_task(world.pipeline(stalled).process([slow]))
    await stalled.reached.wait()
    if second == "delete":
        meanwhile = await world.remove("a.jpg")
    else:
        meanwhile = await world.put("a.jpg", b"two" if second == "overwrite" else BROKEN)
    await world.pipeline().process([meanwhile])
    stalled.go_on.set()
    await first
    await assert_equal_to_bucket(world)


@pytest.mark.parametrize("step", [3, 4, 8, 9])
async def test_a_slow_delete_does_not_take_the_vector_of_the_next_put(step: int) -> None:
    world = await World().start()
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    slow = await world.remove("a.jpg")
    stalled = Stalled(step)
    first: asyncio.Task[None] = asyncio.create_task(world.pipeline(stalled).process([slow]))
    await stalled.reached.wait()
    again = await world.put("a.jpg", b"two")
    await world.pipeline().process([again])
    stalled.go_on.set()
    await first
    await assert_equal_to_bucket(world)
    assert await world.vector_content("a.jpg") == content_hash_of(b"two")


async def test_a_delete_that_overtakes_an_upsert_in_the_vector_store_is_put_right() -> None:
    """The vector store's delete happens after another writer indexed the key again: its vector must come back."""
    world = await World().start()
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    gone = await world.remove("a.jpg")
    delete = world.vectors.delete
    raced = False

    async def slow_delete(name: str, ids: object) -> None:
        nonlocal raced
        if not raced:
            raced = True
            await world.pipeline().process([await world.put("a.jpg", b"two")])
        await delete(name, ids)  # type: ignore[arg-type]

    world.vectors.delete = slow_delete  # type: ignore[method-assign]
    await world.pipeline().process([gone])
    assert raced
    await assert_equal_to_bucket(world)
    assert await world.vector_content("a.jpg") == content_hash_of(b"two")


Operation = tuple[str, str, int]

histories = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "overwrite", "break", "delete", "copy"]),
        st.sampled_from(["a.jpg", "b.jpg", "c.jpg"]),
        st.integers(0, 12),  # step after which the worker dies while this event is in its batch; 0, 11, 12: it does not
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=histories, order=st.randoms(use_true_random=False), batch_size=st.integers(1, 4))
def test_any_history_with_any_crashes_in_any_order_ends_as_the_bucket_says(
    operations: list[Operation], order: random.Random, batch_size: int
) -> None:
    asyncio.run(_history(operations, order, batch_size))


async def _history(operations: list[Operation], order: random.Random, batch_size: int) -> None:
    world = await World().start()
    pending: list[tuple[Delivery, int]] = []
    for number, (operation, key, dies_after) in enumerate(operations):
        if operation == "delete":
            event = await world.remove(key)
        else:
            data = {"break": BROKEN, "copy": b"same bytes"}.get(operation, f"{key}{number}".encode())
            event = await world.put(key, data)
        pending += [(event, dies_after)] * order.choice([1, 1, 2])
        if order.random() < 0.5:
            continue
        order.shuffle(pending)
        await _work_off(world, pending, batch_size)
        pending = []
    await _work_off(world, pending, batch_size)
    await assert_equal_to_bucket(world)


async def _work_off(world: World, pending: list[tuple[Delivery, int]], batch_size: int) -> None:
    for start in range(0, len(pending), batch_size):
        part = pending[start : start + batch_size]
        batch, steps = [event for event, _ in part], {step for _, step in part if step in STEPS}
        for step in steps:
            try:
                await world.pipeline(KillAfter(step)).process(batch)
            except Killed:
                continue
        await world.pipeline().process(batch)


async def test_rows_of_a_history_are_what_subscribers_heard() -> None:
    """Replaying the outcomes by generation gives the same picture as the rows."""
    world = await World().start()
    await world.pipeline().process([await world.put("a.jpg", b"one"), await world.put("b.jpg", b"two")])
    await world.pipeline().process([await world.remove("a.jpg"), await world.put("b.jpg", BROKEN)])
    heard: dict[str, tuple[int, OutcomeType]] = {}
    for outcome in await world.outcomes():
        if outcome.data.generation > heard.get(outcome.data.key, (0, outcome.type))[0]:
            heard[outcome.data.key] = (outcome.data.generation, outcome.type)
    for key, state in (("a.jpg", RowState.DELETED), ("b.jpg", RowState.FAILED)):
        row = await world.row(key)
        assert row is not None
        assert row.ref == ObjectRef(BUCKET, key)
        assert (row.state, row.generation) == (state, heard[key][0])
