"""Server-sent events over HTTP: replay, live, bounds, and ends that are told from breaks."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from infra.errors import StoreUnavailable
from infra.kafka.memory import Operation as BrokerOperation
from query_service.sse import Message, Parser
from schemas.api import ErrorCode
from schemas.events import OutcomeType
from schemas.topics import OUTCOMES, Topic
from tests.query_http import Client, refused, running
from tests.query_world import BUCKET, QueryWorld


async def read_events(response: aiohttp.ClientResponse, until: int | None = None) -> tuple[list[Message], Parser]:
    """The messages of a stream up to its end, or up to this many."""
    parser, messages = Parser(), []
    async for line in response.content:
        message = parser.feed(line.decode().rstrip("\n"))
        if message is not None:
            messages.append(message)
            if len(messages) == until:
                break
    return messages, parser


def event_ids(messages: list[Message]) -> list[str]:
    return [json.loads(message.data)["id"] for message in messages]


async def test_replay_in_parts_gives_each_event_once_and_in_order_by_object(world: QueryWorld, client: Client) -> None:
    sent = [(await world.publish(f"{number % 4}.jpg", generation=number + 1)) for number in range(30)]
    seen: list[Message] = []
    headers: dict[str, str] = {}
    while len(seen) < len(sent):
        async with client.get("/v1/events?cursor=earliest&follow=false", headers=headers) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            messages, _ = await read_events(response, until=7)
        assert messages
        seen += messages
        # As a browser does: the same address again, and the last id in a header.
        headers = {"Last-Event-ID": seen[-1].last_id}
    assert sorted(event_ids(seen)) == sorted(event.id for event in sent)
    for key in range(4):
        generations = [
            data["generation"] for message in seen if (data := json.loads(message.data)["data"])["key"] == f"{key}.jpg"
        ]
        assert generations == sorted(generations)


async def test_live_events_and_heartbeats(world: QueryWorld, client: Client) -> None:
    await world.publish("before.jpg")
    async with client.get("/v1/events") as response:
        lines = [(await response.content.readline()).decode().strip() for _ in range(6)]
        assert lines[0].startswith("retry: ")
        assert lines[1].startswith("id: ")
        assert ": heartbeat" in lines
        event = await world.publish("now.jpg")
        [message], _ = await read_events(response, until=1)
        assert event_ids([message]) == [event.id]


async def test_events_by_type_bucket_and_prefix(world: QueryWorld, client: Client) -> None:
    await world.publish("a/1")
    failed = await world.publish("a/2", kind=OutcomeType.FAILED)
    await world.publish("a/3", kind=OutcomeType.FAILED, bucket="other")
    parameters = {"cursor": "earliest", "follow": "false", "type": "failed,deleted", "bucket": BUCKET, "prefix": "a/"}
    async with client.get("/v1/events", params=parameters) as response:
        messages, parser = await read_events(response)
    assert event_ids(messages) == [failed.id]
    async with client.get("/v1/events", params={"cursor": parser.last_id, "follow": "false"}) as response:
        assert (await read_events(response))[0] == []


async def test_cursors_that_are_none_or_gone(world: QueryWorld, client: Client) -> None:
    await refused(await client.get("/v1/events?cursor=nonsense"), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/events", headers={"Last-Event-ID": "nonsense"}), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/images?cursor=nonsense"), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/events?type=exploded"), ErrorCode.INVALID_REQUEST)
    for generation in range(1, 4):
        await world.publish("a.jpg", generation)
    async with client.get("/v1/events?cursor=earliest&follow=false") as response:
        [first, *_], _ = await read_events(response)
    [partition] = {record.partition for record in world.broker.records(OUTCOMES)}
    world.broker.remove_before(OUTCOMES, partition, 2)
    await refused(await client.get("/v1/events", params={"cursor": first.last_id}), ErrorCode.CURSOR_EXPIRED)


async def test_readers_are_bounded_and_one_that_leaves_makes_room(world: QueryWorld) -> None:
    async with running(world, event_readers=1) as client:
        async with client.get("/v1/events") as response:
            await response.content.readline()
            second = await client.get("/v1/events")
            await refused(second, ErrorCode.TOO_MANY_READERS)
            assert "Retry-After" in second.headers
            response.close()
        async with asyncio.timeout(5):
            while (await client.get("/v1/events?follow=false")).status != 200:
                await asyncio.sleep(0.02)


async def test_a_slow_reader_makes_nothing_grow(world: QueryWorld, client: Client) -> None:
    taken: list[BrokerOperation] = []

    async def count(operation: BrokerOperation, _topic: Topic | None) -> None:
        if operation is BrokerOperation.READ:
            taken.append(operation)

    for number in range(20_000):
        await world.publish(f"{'x' * 500}{number % 50}", number + 1)
    world.broker.before_call = count
    async with client.get("/v1/events?cursor=earliest", read_bufsize=1024) as response:
        await response.content.readline()
        before = -1
        while len(taken) != before:
            before = len(taken)
            await asyncio.sleep(0.3)
        # 40 lists of 500 events are there; what was taken is what fits the sockets between us.
        assert len(taken) < 30
        messages, _ = await read_events(response, until=20_000)
    assert len(set(event_ids(messages))) == 20_000


async def test_a_broker_that_fails_does_not_look_like_the_end(world: QueryWorld, client: Client) -> None:
    await world.publish("a.jpg")
    reads = 0

    async def fail_later(operation: BrokerOperation, _topic: Topic | None) -> None:
        nonlocal reads
        reads += operation is BrokerOperation.READ
        if reads > 1:
            raise StoreUnavailable("broker", "gone")

    world.broker.before_call = fail_later
    async with client.get("/v1/events?cursor=earliest") as response:
        with pytest.raises(aiohttp.ClientError):
            await read_events(response)


async def test_streams_end_when_the_service_stops(world: QueryWorld) -> None:
    async with running(world) as client:
        response = await client.get("/v1/events")
        await response.content.readline()
        async with asyncio.timeout(5):
            await client.server.close()
