"""The event feed: replay from any cursor, nothing lost or doubled over reconnects, a gap is never silent."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.kafka.interface import Message
from query_service.cursors import events_cursor
from query_service.errors import RequestRefused
from query_service.event_feed import EventFeed, FeedFilter, FeedMessage, start_positions
from schemas.api import ErrorCode
from schemas.events import OutcomeEvent, OutcomeType
from schemas.filter import Filter
from schemas.topics import OUTCOMES
from tests.query_world import QueryWorld

ALL = FeedFilter()


@pytest.fixture
async def world() -> QueryWorld:
    return await QueryWorld().start()


async def replay(world: QueryWorld, cursor: str | None, wanted: FeedFilter = ALL) -> list[FeedMessage]:
    feed_of = EventFeed(world.broker, readers=1)
    async with feed_of.open(cursor, wanted, follow=False) as feed:
        return [message async for messages in feed for message in messages]


def ids(messages: list[FeedMessage]) -> list[str]:
    return [json.loads(message.event)["id"] for message in messages]


async def test_earliest_replays_everything_in_order_by_object(world: QueryWorld) -> None:
    sent: dict[str, list[str]] = defaultdict(list)
    for number in range(40):
        key = f"{number % 7}.jpg"
        sent[key].append((await world.publish(key, generation=number + 1)).id)
    seen: dict[str, list[str]] = defaultdict(list)
    for message in await replay(world, "earliest"):
        event = OutcomeEvent.model_validate_json(message.event)
        seen[event.data.key].append(event.id)
    assert seen == sent


@given(keys=st.lists(st.integers(0, 5), max_size=30), stops=st.lists(st.integers(0, 6), max_size=12))
async def test_reconnecting_anywhere_gives_each_event_exactly_once(keys: list[int], stops: list[int]) -> None:
    world = await QueryWorld().start()
    sent = [(await world.publish(f"{key}.jpg", generation=number + 1)).id for number, key in enumerate(keys)]
    seen: list[str] = []
    cursor: str | None = "earliest"
    for stop in [*stops, len(keys)]:
        messages = (await replay(world, cursor))[:stop]
        seen += ids(messages)
        cursor = messages[-1].cursor if messages else cursor
    assert sorted(seen) == sorted(sent)


async def test_without_a_cursor_only_what_comes_is_sent(world: QueryWorld) -> None:
    await world.publish("old.jpg")
    async with EventFeed(world.broker, readers=1).open(None, ALL) as feed:
        await world.publish("new.jpg")
        batch = await anext(aiter(feed))
    assert [json.loads(message.event)["data"]["key"] for message in batch] == ["new.jpg"]


async def test_a_reader_who_saw_nothing_yet_already_has_a_place(world: QueryWorld) -> None:
    await world.publish("old.jpg")
    async with EventFeed(world.broker, readers=1).open(None, ALL) as feed:
        place = feed.cursor
    missed = await world.publish("while-away.jpg")
    assert ids(await replay(world, place)) == [missed.id]


async def test_what_a_filter_left_out_is_not_read_again(world: QueryWorld) -> None:
    for number in range(5):
        await world.publish(f"{number}.jpg")
    wanted = FeedFilter(types=frozenset({OutcomeType.FAILED}))
    async with EventFeed(world.broker, readers=1).open("earliest", wanted, follow=False) as feed:
        assert [message async for messages in feed for message in messages] == []
        behind_all = feed.cursor
    assert await replay(world, behind_all) == []


async def test_filters(world: QueryWorld) -> None:
    await world.publish("a/1.jpg")
    failed = await world.publish("a/2.jpg", kind=OutcomeType.FAILED)
    other = await world.publish("b/1.jpg", bucket="other")
    assert ids(await replay(world, "earliest", FeedFilter(frozenset({OutcomeType.FAILED})))) == [failed.id]
    assert ids(await replay(world, "earliest", FeedFilter(narrow=Filter("other")))) == [other.id]
    assert ids(await replay(world, "earliest", FeedFilter(frozenset({OutcomeType.FAILED}), Filter(None, "a/2")))) == [failed.id]


async def test_events_newer_than_this_version_pass_and_rubbish_does_not(world: QueryWorld) -> None:
    matched = {"type": "image-search.image.matched", "id": "m", "data": {"bucket": "images", "key": "a", "watch": 7}}
    for value in (json.dumps(matched).encode(), b"not json", b'{"type": "no data"}'):
        await world.broker.send(OUTCOMES, [Message(b"images/a", value)])
    assert [json.loads(message.event) for message in await replay(world, "earliest")] == [matched]


def code_of(cursor: str, offsets: dict[int, tuple[int, int]]) -> ErrorCode:
    with pytest.raises(RequestRefused) as refused:
        start_positions(cursor, offsets)
    return refused.value.code


def test_a_cursor_whose_events_are_gone_is_refused() -> None:
    assert code_of(events_cursor({0: 4}), {0: (5, 9)}) is ErrorCode.CURSOR_EXPIRED
    assert start_positions(events_cursor({0: 5}), {0: (5, 9)}) == {0: 5}


def test_a_cursor_of_another_deployment_is_refused() -> None:
    assert code_of(events_cursor({0: 10}), {0: (0, 9)}) is ErrorCode.INVALID_CURSOR
    assert code_of(events_cursor({0: 0, 1: 0}), {0: (0, 9)}) is ErrorCode.INVALID_CURSOR


def test_a_partition_added_later_is_read_from_its_beginning() -> None:
    assert start_positions(events_cursor({0: 5}), {0: (0, 9), 1: (3, 8)}) == {0: 5, 1: 3}


async def test_retention_passing_a_slow_reader_is_no_silent_gap(world: QueryWorld) -> None:
    first = await world.publish("a.jpg", generation=1)
    async with EventFeed(world.broker, readers=1).open("earliest", ALL) as feed:
        batches = aiter(feed)
        assert ids(await anext(batches)) == [first.id]
        for generation in range(2, 6):
            await world.publish("a.jpg", generation)
        [partition] = {record.partition for record in world.broker.records(OUTCOMES)}
        world.broker.remove_before(OUTCOMES, partition, 3)
        with pytest.raises(RequestRefused) as refused:
            await anext(batches)
    assert refused.value.code is ErrorCode.CURSOR_EXPIRED


async def test_readers_are_bounded_and_places_come_back(world: QueryWorld) -> None:
    feed_of = EventFeed(world.broker, readers=1)
    async with feed_of.open(None, ALL):
        with pytest.raises(RequestRefused) as refused:
            async with feed_of.open(None, ALL):
                pass
    assert refused.value.code is ErrorCode.TOO_MANY_READERS
    with pytest.raises(RequestRefused):
        async with feed_of.open("rubbish", ALL):
            pass
    async with feed_of.open(None, ALL):
        pass
