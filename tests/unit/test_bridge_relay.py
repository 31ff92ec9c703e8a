"""The relay over the twin of the broker: what it writes, what it commits, and in which order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote_plus

import pytest

from infra.errors import StoreUnavailable
from infra.kafka.interface import Message, Record
from infra.kafka.memory import MemoryBroker, Operation
from ingest_bridge import relay as relay_module
from ingest_bridge.relay import Relay
from schemas.events import ObjectEvent
from schemas.topics import (
    ALL_TOPICS,
    DEAD_LETTERS,
    HEADER_OFFSET,
    HEADER_PARTITION,
    HEADER_REASON,
    HEADER_TOPIC,
    OBJECT_NOTIFICATIONS,
    OBJECTS,
    RELAY_GROUP,
    Topic,
)


def notification(key: str, *, bucket: str = "images", name: str = "s3:ObjectCreated:Put", etag: str = "e") -> Message:
    entity = {"bucket": {"name": bucket}, "object": {"key": quote_plus(key), "eTag": etag}}
    record = {"eventSource": "minio:s3", "eventName": name, "eventTime": "2026-03-01T10:20:30.456Z", "s3": entity}
    return Message(f"{bucket}/{key}".encode(), json.dumps({"Records": [record]}).encode())


class World:
    def __init__(self) -> None:
        self.broker = MemoryBroker(*ALL_TOPICS, partitions=2, idle_seconds=0.01)
        self.gaps = 0
        self.waits: list[float] = []

    async def relay(self) -> Relay:
        return Relay(
            deployment="local",
            buckets=("images",),
            broker=self.broker,
            producer=await self.broker.producer(),
            on_gap=self.note_gap,
            sleep=self.sleep,
        )

    def note_gap(self) -> None:
        self.gaps += 1

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(0)

    async def notify(self, *messages: Message) -> None:
        await self.broker.send(OBJECT_NOTIFICATIONS, messages)

    @asynccontextmanager
    async def relaying(self) -> AsyncIterator[Relay]:
        relay = await self.relay()
        running = asyncio.create_task(relay.run())
        try:
            yield relay
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def until_committed(self) -> None:
        async with asyncio.timeout(5):
            while sum(lag.pending for lag in await self.broker.lag(OBJECT_NOTIFICATIONS, RELAY_GROUP)):
                await asyncio.sleep(0)

    def events(self) -> list[ObjectEvent]:
        return [ObjectEvent.model_validate_json(record.value) for record in self.broker.records(OBJECTS)]

    def keys(self) -> list[str]:
        return sorted(event.data.key for event in self.events())

    def dead_letters(self) -> list[Record]:
        return self.broker.records(DEAD_LETTERS)


@pytest.fixture
def world() -> World:
    return World()


async def test_notifications_become_object_events_under_the_object_s_key(world: World) -> None:
    await world.notify(notification("a b+c.jpg"), notification("x.jpg", name="s3:ObjectRemoved:Delete"))
    async with world.relaying():
        await world.until_committed()
    assert world.keys() == ["a b+c.jpg", "x.jpg"]
    for record in world.broker.records(OBJECTS):
        assert record.key == ObjectEvent.model_validate_json(record.value).data.ref.topic_key


async def test_the_changes_of_one_object_stay_in_their_order(world: World) -> None:
    await world.notify(*(notification("a.jpg", etag=str(number)) for number in range(50)))
    async with world.relaying():
        await world.until_committed()
    assert [event.data.etag for event in world.events()] == [str(number) for number in range(50)]


async def test_nothing_is_committed_before_the_broker_has_the_events(world: World) -> None:
    refusals = 3

    async def refuse_some(operation: Operation, topic: Topic | None) -> None:
        nonlocal refusals
        if operation is Operation.SEND and topic is OBJECTS and refusals:
            refusals -= 1
            assert sum(lag.pending for lag in await world.broker.lag(OBJECT_NOTIFICATIONS, RELAY_GROUP)) == 1
            raise StoreUnavailable("broker", "away")
        if operation is Operation.COMMIT:
            assert world.keys() == ["a.jpg"]

    await world.notify(notification("a.jpg"))
    world.broker.before_call = refuse_some
    async with world.relaying():
        await world.until_committed()
    assert refusals == 0
    assert world.keys() == ["a.jpg"]


async def test_what_was_written_and_not_committed_is_read_again_and_written_once_by_the_same_bridge(world: World) -> None:
    refused = False

    async def refuse_first_commit(operation: Operation, _topic: Topic | None) -> None:
        nonlocal refused
        if operation is Operation.COMMIT and not refused:
            refused = True
            raise StoreUnavailable("broker", "away")
        if operation is Operation.CONSUME and refused and not world.waits:
            raise StoreUnavailable("broker", "away")

    await world.notify(notification("a.jpg"))
    world.broker.before_call = refuse_first_commit
    async with world.relaying():
        await world.until_committed()
    assert world.waits
    assert world.keys() == ["a.jpg"]


async def test_a_bridge_that_died_before_its_commit_leaves_its_work_to_the_next(world: World) -> None:
    stuck = asyncio.Event()

    async def hang_at_commit(operation: Operation, _topic: Topic | None) -> None:
        if operation is Operation.COMMIT and not stuck.is_set():
            stuck.set()
            await asyncio.Event().wait()

    await world.notify(notification("a.jpg"))
    world.broker.before_call = hang_at_commit
    async with world.relaying():
        await stuck.wait()
    async with world.relaying():
        await world.until_committed()
    assert world.keys() == ["a.jpg", "a.jpg"]
    assert len({event.id for event in world.events()}) == 1


async def test_the_second_announcement_of_a_change_is_dropped(world: World) -> None:
    await world.notify(notification("a.jpg"), notification("a.jpg"))
    async with world.relaying():
        await world.until_committed()
        await world.notify(notification("a.jpg"), notification("a.jpg", etag="f"))
        await world.until_committed()
    assert [event.data.etag for event in world.events()] == ["e", "f"]


async def test_only_so_many_ids_are_remembered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "REMEMBERED_IDS", 2)
    async with world.relaying():
        for key in ("a", "b", "c", "a"):
            await world.notify(notification(key))
            await world.until_committed()
    assert world.keys() == ["a", "a", "b", "c"]


async def test_poison_costs_one_dead_letter_and_a_scan(world: World) -> None:
    poison = Message(b"images/poison.jpg", b"not json")
    await world.notify(notification("a.jpg"), poison, notification("b.jpg"))
    async with world.relaying():
        await world.until_committed()
    assert world.keys() == ["a.jpg", "b.jpg"]
    (letter,) = world.dead_letters()
    (record,) = [record for record in world.broker.records(OBJECT_NOTIFICATIONS) if record.value == poison.value]
    assert (letter.key, letter.value) == (poison.key, poison.value)
    assert letter.headers[HEADER_TOPIC] == OBJECT_NOTIFICATIONS.name
    assert (letter.headers[HEADER_PARTITION], letter.headers[HEADER_OFFSET]) == (str(record.partition), str(record.offset))
    assert letter.headers[HEADER_REASON] == "EVENT_NOT_JSON"
    assert world.gaps == 1


async def test_other_buckets_are_passed_over(world: World) -> None:
    await world.notify(notification("a.jpg", bucket="another"))
    async with world.relaying():
        await world.until_committed()
    assert world.events() == []
    assert world.dead_letters() == []
    assert world.gaps == 0


async def test_it_comes_back_to_a_broker_that_was_away_and_is_not_well_meanwhile(world: World) -> None:
    relay = await world.relay()
    with pytest.raises(StoreUnavailable):
        await relay.check()

    async def away(operation: Operation, _topic: Topic | None) -> None:
        if operation is Operation.CONSUME and len(world.waits) < 20:
            with pytest.raises(StoreUnavailable):
                await relay.check()
            raise StoreUnavailable("broker", "away")

    world.broker.before_call = away
    await world.notify(notification("a.jpg"))
    running = asyncio.create_task(relay.run())
    await world.until_committed()
    await relay.check()
    running.cancel()
    await asyncio.wait([running])
    assert world.keys() == ["a.jpg"]
    assert len(world.waits) == 20
    assert max(world.waits) <= relay_module.LONGEST_RESTART_SECONDS
