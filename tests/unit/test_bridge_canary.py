"""The canary over a store and a broker in memory: what it finds out, what it leaves behind, and who else hears of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import REGISTRY

from infra.errors import StoreRefused, StoreUnavailable
from infra.kafka.interface import Message
from infra.kafka.memory import MemoryBroker
from infra.object_store.memory import MemoryObjectStore, Operation
from ingest_bridge.canary import Canary
from ingest_bridge.notification_rules import plan_rules
from ingest_bridge.notifications.s3 import parse_message
from ingest_bridge.notifications.seaweedfs import parse_document
from schemas.events import ReasonCode
from schemas.identity import RESERVED_PREFIX
from schemas.topics import ALL_TOPICS, OBJECT_NOTIFICATIONS

TARGETS = ("arn:minio:sqs::direct:kafka", "arn:minio:sqs::stored:kafka")


class World:
    """A store that announces what is done to it, for as long as `announced` has the operation."""

    def __init__(self) -> None:
        self.broker = MemoryBroker(*ALL_TOPICS, idle_seconds=0.01)
        self.store = MemoryObjectStore("images", targets=TARGETS)
        self.store.before_call = self._announce
        self.announced = {Operation.PUT, Operation.DELETE}
        self.names = {Operation.PUT: "ObjectCreated:Put", Operation.DELETE: "ObjectRemoved:Delete"}
        self.gaps = 0
        self.turns = asyncio.Semaphore(0)
        self.turned = asyncio.Event()

    async def _announce(self, operation: Operation, bucket: str, key: str | None) -> None:
        if operation in self.announced and key is not None:
            name = self.names[operation]
            entity = {"bucket": {"name": bucket}, "object": {"key": key}}
            record = {"eventName": name, "eventTime": "2026-03-01T10:20:30.456Z", "s3": entity}
            await self.broker.send(OBJECT_NOTIFICATIONS, [Message(b"", json.dumps({"Records": [record]}).encode())])

    async def set_rules(self) -> None:
        await self.store.set_notification_rules("images", plan_rules("images", [], TARGETS).wanted)

    def note_gap(self) -> None:
        self.gaps += 1

    async def sleep(self, _seconds: float) -> None:
        self.turned.set()
        await self.turns.acquire()

    async def next_turn(self) -> None:
        self.turned.clear()
        self.turns.release()
        await self.turned.wait()

    async def left(self) -> list[str]:
        return [stat.ref.key async for page in self.store.list_pages("images") for stat in page]

    @asynccontextmanager
    async def flown(self) -> AsyncIterator[Canary]:
        """Once; `next_turn` lets it fly again."""
        canary = Canary(
            name="here",
            buckets=("images",),
            targets=TARGETS,
            interval_seconds=1,
            objects=self.store,
            broker=self.broker,
            on_gap=self.note_gap,
            wait_seconds=0.05,
            sleep=self.sleep,
        )
        running = asyncio.create_task(canary.run())
        try:
            async with asyncio.timeout(5):
                await self.turned.wait()
            yield canary
        finally:
            running.cancel()
            await asyncio.wait([running])


@pytest.fixture
async def world() -> World:
    world = World()
    await world.set_rules()
    return world


def flights(step: str) -> float:
    return REGISTRY.get_sample_value("image_search_canary_seconds_count", {"step": step}) or 0.0


def failures(reason: str) -> float:
    return REGISTRY.get_sample_value("image_search_canary_failures_total", {"reason": reason}) or 0.0


async def test_both_ways_are_timed_and_nothing_is_left(world: World) -> None:
    before = flights("put"), flights("removal")
    async with world.flown() as canary:
        await canary.check()
    assert (flights("put"), flights("removal")) == (before[0] + 1, before[1] + 1)
    assert world.gaps == 0
    assert await world.left() == []


@pytest.mark.parametrize("silent", [Operation.PUT, Operation.DELETE])
async def test_a_change_that_is_not_announced_is_told_of_and_looked_for(world: World, silent: Operation) -> None:
    before = failures("unseen")
    world.announced.discard(silent)
    async with world.flown() as canary:
        with pytest.raises(StoreUnavailable, match="not announced"):
            await canary.check()
        assert failures("unseen") == before + 1
        assert world.gaps == 1
        assert await world.left() == []
        world.announced.add(silent)
        await world.next_turn()
        await canary.check()


async def test_a_late_copy_of_the_put_is_no_removal(world: World) -> None:
    world.names[Operation.DELETE] = world.names[Operation.PUT]
    async with world.flown() as canary:
        with pytest.raises(StoreUnavailable, match="not announced"):
            await canary.check()


async def test_rules_that_were_taken_away_are_told_of_with_what_to_do(world: World) -> None:
    before = failures("rules")
    (direct, _stored) = await world.store.notification_rules("images")
    await world.store.set_notification_rules("images", [direct])
    async with world.flown() as canary:
        with pytest.raises(StoreUnavailable, match="image-search provision"):
            await canary.check()
        assert failures("rules") == before + 1
        assert world.gaps == 1
        await world.set_rules()
        await world.next_turn()
        await canary.check()


async def test_a_store_that_is_away_or_denies_says_nothing_about_its_rules(world: World) -> None:
    async def deny(operation: Operation, _bucket: str, _key: str | None) -> None:
        if operation is Operation.PUT:
            raise StoreRefused(ReasonCode.ACCESS_DENIED, "denied")

    world.store.before_call = deny
    async with world.flown() as canary:
        await canary.check()
    assert world.gaps == 0


async def test_nobody_else_hears_of_it(world: World) -> None:
    async with world.flown():
        pass
    records = world.broker.records(OBJECT_NOTIFICATIONS)
    assert len(records) >= 2
    for record in records:
        parsed = parse_message(record.value, deployment="local", buckets=["images"])
        assert (parsed.events, parsed.reserved) == ((), 1)
        (event,) = parse_message(record.value, deployment="local", buckets=["images"], reserved=True).events
        assert event.data.key.startswith(RESERVED_PREFIX)


def test_seaweedfs_s_log_says_nothing_of_reserved_keys_either() -> None:
    entry = {"name": "here", "attributes": {"mtime": "1", "fileSize": "1"}}
    folder = f"/buckets/images/{RESERVED_PREFIX}canary"
    document = {"directory": folder, "eventNotification": {"newEntry": entry, "newParentPath": folder}, "tsNs": "1"}
    assert parse_document(json.dumps(document).encode(), deployment="local", buckets=["images"]).events == ()
