"""`indexed_through`: the least of what waits and what was handed over, never going back, honest when it does not know."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import REGISTRY

from infra.errors import StoreUnavailable
from infra.kafka.interface import Message, PartitionLag
from infra.kafka.memory import MemoryBroker, Operation
from infra.metadata_store.interface import Cursor
from infra.metadata_store.memory import MemoryMetadataStore
from query_service.freshness import FreshnessFollower
from schemas.tables import log_cursor_name
from schemas.topics import ALL_TOPICS, OBJECT_NOTIFICATIONS, OBJECTS, PROCESSOR_GROUP, RELAY_GROUP, Topic

START = datetime(2026, 1, 1, tzinfo=UTC)
BOUND = timedelta(seconds=0.5)


class Clock:
    """Seconds since START, moved by hand."""

    seconds = 0.0

    def now(self) -> float:
        return START.timestamp() + self.seconds

    def now_ms(self) -> int:
        return round(self.now() * 1000)


class Scene:
    def __init__(self, *buckets: str, notified: bool = False) -> None:
        self.clock = Clock()
        self.broker = MemoryBroker(*ALL_TOPICS, partitions=2, now_ms=self.clock.now_ms)
        self.metadata = MemoryMetadataStore()
        self.buckets = buckets or ("images",)
        self.follower = FreshnessFollower(
            broker=self.broker,
            metadata=self.metadata,
            buckets=self.followed,
            group=PROCESSOR_GROUP,
            visibility_bound_seconds=BOUND.total_seconds(),
            notified=notified,
            now=self.clock.now,
        )

    async def followed(self) -> tuple[str, ...]:
        return self.buckets

    async def handed_over(self, seconds: float, bucket: str = "images") -> None:
        position = round((START.timestamp() + seconds) * 1_000_000_000)
        await self.metadata.save_cursor(log_cursor_name(bucket), Cursor(position, clean=False))

    async def event(self) -> None:
        await self.broker.send(OBJECTS, [Message(b"images/a", b"{}")])

    def work_off(self) -> None:
        for record in self.broker.records(OBJECTS):
            self.broker.commit(OBJECTS, PROCESSOR_GROUP, {record.partition: record.offset + 1})

    async def through(self) -> float | None:
        """Seconds since START, without the visibility bound."""
        await self.follower.refresh()
        moment = self.follower.status().indexed_through
        return None if moment is None else (moment + BOUND - START).total_seconds()


async def test_notifications_that_wait_for_the_bridge_count_and_no_change_log_is_asked_for() -> None:
    scene = Scene(notified=True)
    scene.clock.seconds = 3
    assert await scene.through() == 3
    await scene.broker.send(OBJECT_NOTIFICATIONS, [Message(b"images/a", b"{}")])
    scene.clock.seconds = 5
    await scene.event()
    scene.clock.seconds = 10
    assert await scene.through() == 3
    for record in scene.broker.records(OBJECT_NOTIFICATIONS):
        scene.broker.commit(OBJECT_NOTIFICATIONS, RELAY_GROUP, {record.partition: record.offset + 1})
    assert await scene.through() == 5
    assert {name: lag.pending for name, lag in scene.follower.lag.items()} == {"object-notifications": 0, "objects": 1}
    scene.work_off()
    assert await scene.through() == 10


async def test_nothing_waits_and_all_is_handed_over_means_now() -> None:
    scene = Scene()
    scene.clock.seconds = 10
    await scene.handed_over(10)
    assert await scene.through() == 10
    assert scene.follower.status().lag_ms == 500
    assert scene.follower.status().reason is None


async def test_what_is_not_handed_over_yet_counts() -> None:
    scene = Scene()
    scene.clock.seconds = 10
    await scene.handed_over(7)
    assert await scene.through() == 7


async def test_what_is_handed_over_between_the_two_questions_is_not_vouched_for() -> None:
    """Written to the topic after its lag was asked, and counted as handed over: nobody would see it waiting."""
    scene = Scene()
    scene.clock.seconds = 10
    await scene.handed_over(7)
    lag = scene.broker.lag

    async def lag_then_hand_over(topic: Topic, group: str) -> list[PartitionLag]:
        answer = await lag(topic, group)
        await scene.event()
        await scene.handed_over(9)
        return answer

    scene.broker.lag = lag_then_hand_over  # type: ignore[method-assign]
    assert await scene.through() == 7


async def test_a_log_ahead_of_our_clock_does_not_promise_the_future() -> None:
    scene = Scene()
    scene.clock.seconds = 10
    await scene.handed_over(60)
    assert await scene.through() == 10


async def test_the_first_waiting_event_counts_until_it_is_worked_on() -> None:
    scene = Scene()
    scene.clock.seconds = 3
    await scene.event()
    scene.clock.seconds = 10
    await scene.event()
    await scene.handed_over(10)
    assert await scene.through() == 3
    assert scene.follower.lag[OBJECTS.name].pending == 2
    assert REGISTRY.get_sample_value("image_search_objects_lag") == 2
    scene.work_off()
    assert await scene.through() == 10
    assert scene.follower.lag[OBJECTS.name].pending == 0


async def test_the_slowest_bucket_counts() -> None:
    scene = Scene("images", "more")
    scene.clock.seconds = 10
    await scene.handed_over(9, "images")
    await scene.handed_over(4, "more")
    assert await scene.through() == 4


async def test_it_never_goes_back() -> None:
    scene = Scene()
    scene.clock.seconds = 10
    await scene.handed_over(10)
    assert await scene.through() == 10
    await scene.handed_over(2)
    assert await scene.through() == 10
    scene.clock.seconds = 12
    assert await scene.through() == 10
    assert scene.follower.status().lag_ms == 2500


async def test_unknown_until_a_log_was_followed() -> None:
    scene = Scene()
    assert scene.follower.status().reason is not None
    assert await scene.through() is None
    assert "images" in (scene.follower.status().reason or "")


async def test_a_store_that_is_down_stops_it_and_is_named() -> None:
    scene = Scene()
    scene.clock.seconds = 10
    await scene.handed_over(10)
    assert await scene.through() == 10

    async def down(_operation: Operation, _topic: Topic | None) -> None:
        raise StoreUnavailable("broker", "refused")

    scene.broker.before_call = down
    scene.clock.seconds = 20
    await scene.handed_over(20)
    assert await scene.through() == 10
    assert scene.follower.status().reason == "broker is not available"
    assert scene.follower.status().lag_ms == pytest.approx(10_500)
