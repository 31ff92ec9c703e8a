"""A rebuild is over when the workers have done what was written, and says so when there are none."""

from __future__ import annotations

import pytest

from infra.kafka.interface import Message
from infra.kafka.memory import MemoryBroker
from ingest_bridge.rebuild import STALLED_SECONDS, WorkersStalled, until_worked_off
from schemas.topics import ALL_TOPICS, OBJECTS, PROCESSOR_GROUP


class Workers:
    """Each time the command waits, they commit some events and others are written."""

    def __init__(self, broker: MemoryBroker, *, at_once: int) -> None:
        self.broker, self.at_once = broker, at_once
        self.seconds = 0.0
        self.left: list[int] = []

    async def wait(self, seconds: float) -> None:
        self.seconds += seconds
        room = self.at_once
        for lag in await self.broker.lag(OBJECTS, PROCESSOR_GROUP):
            taken = min(room, lag.pending)
            room -= taken
            self.broker.commit(OBJECTS, PROCESSOR_GROUP, {lag.partition: max(lag.committed, lag.begin) + taken})


async def written(broker: MemoryBroker, number: int) -> None:
    producer = await broker.producer()
    await producer.send(OBJECTS, [Message(b"%d" % one, b"{}") for one in range(number)])


async def test_it_ends_when_all_that_was_written_is_done() -> None:
    broker = MemoryBroker(*ALL_TOPICS)
    await written(broker, 10)
    workers = Workers(broker, at_once=4)
    await until_worked_off(broker, workers.left.append, now=lambda: workers.seconds, sleep=workers.wait)
    assert workers.left == [10, 6, 2, 0]


async def test_what_is_written_meanwhile_is_not_waited_for() -> None:
    broker = MemoryBroker(*ALL_TOPICS)
    await written(broker, 10)
    workers = Workers(broker, at_once=1000)

    async def and_more_comes(seconds: float) -> None:
        await workers.wait(seconds)
        await written(broker, 5)

    await until_worked_off(broker, workers.left.append, now=lambda: workers.seconds, sleep=and_more_comes)
    assert workers.left == [10, 0]


async def test_workers_that_do_nothing_are_not_waited_for_for_ever() -> None:
    broker = MemoryBroker(*ALL_TOPICS)
    await written(broker, 10)
    workers = Workers(broker, at_once=0)
    with pytest.raises(WorkersStalled, match="10 events"):
        await until_worked_off(broker, workers.left.append, now=lambda: workers.seconds, sleep=workers.wait)
    assert workers.seconds > STALLED_SECONDS
