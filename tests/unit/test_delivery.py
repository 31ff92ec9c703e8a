"""Batches of what waits, one batch an object at a time, acknowledgements in offset order whatever finishes first."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from processors.delivery import Batcher
from processors.work import Delivery, IsOurs, PartitionsRevoked


@dataclass(frozen=True)
class FakeMessage:
    offset: int
    key: bytes
    topic: str = "objects"
    partition: int = 0
    timestamp: float = 0.0
    value: bytes = b"{}"
    headers: tuple[tuple[str, bytes | None], ...] = ()


@dataclass(frozen=True)
class FakeEvent:
    message: FakeMessage
    acked: list[int] = field(repr=False)

    def ack(self) -> bool:
        self.acked.append(self.message.offset)
        return True


class Work:
    """Stands for the pipeline: each batch ends when the test says so."""

    def __init__(self, *, drops: bool = True) -> None:
        self.drops = drops
        self.batches: list[list[int]] = []
        self.gates: list[asyncio.Event] = []

    async def process(self, deliveries: Sequence[Delivery], is_ours: IsOurs) -> None:
        self.batches.append([delivery.offset for delivery in deliveries])
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()
        if self.drops and not is_ours():
            raise PartitionsRevoked("test")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def fed(work: Work, keys: Sequence[str], *, in_flight: int = 2, size: int = 3) -> tuple[Batcher, list[int]]:
    batcher = Batcher(work.process, batch_size=size, batches_in_flight=in_flight, queue_events=64)
    acked: list[int] = []
    for offset, key in enumerate(keys):
        await batcher.put(FakeEvent(FakeMessage(offset, key.encode()), acked))
    await batcher.start()
    await settle()
    return batcher, acked


async def finish(batcher: Batcher, work: Work) -> None:
    while batcher.in_hand:
        for gate in work.gates:
            gate.set()
        await settle()
    await batcher.stop()


async def test_a_later_batch_is_not_acknowledged_before_an_earlier_one() -> None:
    work = Work()
    batcher, acked = await fed(work, "abcdef")
    assert work.batches == [[0, 1, 2], [3, 4, 5]]
    work.gates[1].set()
    await settle()
    assert acked == []
    work.gates[0].set()
    await settle()
    assert acked == [0, 1, 2, 3, 4, 5]
    await batcher.stop()


async def test_one_object_is_in_one_batch_at_a_time() -> None:
    work = Work()
    batcher, acked = await fed(work, "abcad")
    assert work.batches == [[0, 1, 2]]
    work.gates[0].set()
    await settle()
    assert work.batches == [[0, 1, 2], [3, 4]]
    await finish(batcher, work)
    assert acked == [0, 1, 2, 3, 4]


async def test_what_waits_becomes_one_batch() -> None:
    work = Work()
    batcher, acked = await fed(work, "a", in_flight=1, size=10)
    for offset, key in enumerate("bcd", start=1):
        await batcher.put(FakeEvent(FakeMessage(offset, key.encode()), acked))
    await settle()
    work.gates[0].set()
    await settle()
    assert work.batches == [[0], [1, 2, 3]]
    await finish(batcher, work)


async def test_what_is_in_hand_is_told_while_a_batch_is_stuck() -> None:
    work = Work()
    batcher, acked = await fed(work, "abc", in_flight=1)
    await batcher.put(FakeEvent(FakeMessage(3, b"d"), acked))
    assert REGISTRY.get_sample_value("image_search_events_in_hand") == 4
    await finish(batcher, work)
    assert REGISTRY.get_sample_value("image_search_events_in_hand") == 0


async def test_a_stop_finishes_what_is_in_flight_and_leaves_the_queue() -> None:
    work = Work()
    batcher, acked = await fed(work, "abcdef", in_flight=1)
    stopping = asyncio.create_task(batcher.stop())
    await settle()
    assert acked == []
    work.gates[0].set()
    await stopping
    assert acked == [0, 1, 2]
    assert work.batches == [[0, 1, 2]]


@pytest.mark.parametrize("drops", [True, False], ids=["before it wrote", "after it wrote"])
async def test_what_is_in_hand_at_a_rebalance_is_never_acknowledged_and_comes_again(drops: bool) -> None:
    work = Work(drops=drops)
    batcher, acked = await fed(work, "abcdef", in_flight=1)
    batcher.drop()
    for offset, key in enumerate("abcdef"):
        await batcher.put(FakeEvent(FakeMessage(offset, key.encode()), acked))
    work.gates[0].set()
    await settle()
    assert acked == []
    assert work.batches == [[0, 1, 2], [0, 1, 2]]
    await finish(batcher, work)
    assert acked == [0, 1, 2, 3, 4, 5]


async def test_an_event_that_waited_for_room_in_the_queue_during_a_rebalance_is_dropped_too() -> None:
    work = Work()
    batcher = Batcher(work.process, batch_size=1, batches_in_flight=1, queue_events=1)
    acked: list[int] = []
    await batcher.put(FakeEvent(FakeMessage(0, b"a"), acked))
    late = asyncio.create_task(batcher.put(FakeEvent(FakeMessage(1, b"b"), acked)))
    await settle()
    batcher.drop()
    await batcher.start()
    await settle()
    assert late.done()
    await batcher.put(FakeEvent(FakeMessage(0, b"a"), acked))
    await settle()
    assert work.batches == [[0]]
    await finish(batcher, work)
    assert acked == [0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_batch_that_fails_ends_the_service_and_nothing_behind_it_is_acknowledged() -> None:
    fail = asyncio.Event()

    async def process(deliveries: Sequence[Delivery], _is_ours: IsOurs) -> None:
        if deliveries[0].offset == 0:
            await fail.wait()
            raise RuntimeError("bug")

    batcher = Batcher(process, batch_size=1, batches_in_flight=2, queue_events=8)
    acked: list[int] = []
    for offset, key in enumerate("ab"):
        await batcher.put(FakeEvent(FakeMessage(offset, key.encode()), acked))
    await batcher.start()
    await settle()
    fail.set()
    await settle()
    assert acked == []
    assert isinstance(batcher.crash_reason, RuntimeError)
    await batcher.stop()


@settings(max_examples=50, deadline=None)
@given(
    keys=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
    size=st.integers(1, 5),
    in_flight=st.integers(1, 4),
)
def test_whatever_finishes_first_acknowledgements_keep_the_order_of_offsets(
    keys: list[str], order: random.Random, size: int, in_flight: int
) -> None:
    async def scenario() -> list[int]:
        work = Work()
        batcher, acked = await fed(work, keys, in_flight=in_flight, size=size)
        while batcher.in_hand:
            closed = [gate for gate in work.gates if not gate.is_set()]
            order.choice(closed).set()
            await settle()
        await batcher.stop()
        for batch in work.batches:
            assert len(batch) <= size
        return acked

    assert asyncio.run(scenario()) == list(range(len(keys)))
