"""The webhook's handler: who may speak, how much, and when it says that a notification was taken."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest import mock

import pytest
from aiohttp import StreamReader, web
from aiohttp.test_utils import make_mocked_request

from infra.errors import StoreUnavailable
from infra.kafka.memory import MemoryBroker, Operation
from ingest_bridge.receiver import PATH, Receiver
from schemas.events import ObjectEvent
from schemas.topics import ALL_TOPICS, DEAD_LETTERS, OBJECTS, Topic

SECRET = "s3cret-ä"
AUTHORIZED = {"Authorization": f"Bearer {SECRET}"}
PUT = (Path(__file__).parent.parent / "data" / "notifications" / "minio_put.json").read_bytes()
BODY_BYTES = 4096


class World:
    def __init__(self) -> None:
        self.broker = MemoryBroker(*ALL_TOPICS)
        self.gaps = 0

    def note_gap(self) -> None:
        self.gaps += 1

    async def call(
        self, body: bytes | None = PUT, headers: dict[str, str] | None = None, *, timeout_seconds: float = 5.0
    ) -> web.StreamResponse:
        """`body`: None for one that never comes."""
        receiver = Receiver(
            secret=SECRET,
            deployment="local",
            buckets=("images",),
            producer=await self.broker.producer(),
            on_gap=self.note_gap,
            body_bytes=BODY_BYTES,
            timeout_seconds=timeout_seconds,
        )
        payload = StreamReader(mock.Mock(_reading_paused=False), 2**16, loop=asyncio.get_running_loop())
        if body is not None:
            for start in range(0, len(body), 1000):
                payload.feed_data(body[start : start + 1000])
            payload.feed_eof()
        request = make_mocked_request("POST", PATH, headers=AUTHORIZED if headers is None else headers, payload=payload)
        answer: web.StreamResponse = await receiver.route().handler(request)
        return answer

    def keys(self) -> list[str]:
        return [ObjectEvent.model_validate_json(record.value).data.key for record in self.broker.records(OBJECTS)]


@pytest.fixture
def world() -> World:
    return World()


async def test_taken_when_the_broker_has_the_events(world: World) -> None:
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def hold(operation: Operation, _topic: Topic | None) -> None:
        if operation is Operation.SEND:
            waiting.set()
            await go_on.wait()

    world.broker.before_call = hold
    answer = asyncio.create_task(world.call())
    await waiting.wait()
    assert not answer.done()
    go_on.set()
    assert (await answer).status == 204
    assert world.keys() == ["dir/a+b %20ä.jpg"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": SECRET}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "ä"}],
)
async def test_nobody_is_heard_without_the_secret(world: World, headers: dict[str, str]) -> None:
    answer = await world.call(None, headers)
    assert answer.status == 401
    assert world.keys() == []


async def test_a_receiver_has_a_secret() -> None:
    with pytest.raises(ValueError, match="secret"):
        Receiver(
            secret="",
            deployment="local",
            buckets=(),
            producer=await MemoryBroker().producer(),
            on_gap=lambda: None,
            body_bytes=1,
            timeout_seconds=1,
        )


@pytest.mark.parametrize("body", [b"", b"not json", b"{}", PUT[:-10]])
async def test_what_is_no_notification_is_refused_and_looked_for(world: World, body: bytes) -> None:
    assert (await world.call(body)).status == 400
    assert world.gaps == 1
    assert world.broker.records(DEAD_LETTERS) == []


async def test_a_test_message_is_taken_and_says_nothing(world: World) -> None:
    assert (await world.call(b'{"Event": "s3:TestEvent"}')).status == 204
    assert (world.keys(), world.gaps) == ([], 0)


async def test_the_largest_body_is_taken_and_one_byte_more_is_not(world: World) -> None:
    assert (await world.call(PUT.ljust(BODY_BYTES))).status == 204
    answer = await world.call(PUT.ljust(BODY_BYTES + 1))
    assert answer.status == 413
    assert answer.keep_alive is False
    assert len(world.keys()) == 1


async def test_a_body_that_does_not_come_is_not_waited_for(world: World) -> None:
    assert (await world.call(None, timeout_seconds=0.01)).status == 408


async def test_while_the_broker_is_away_a_store_shall_call_again(world: World) -> None:
    async def away(operation: Operation, _topic: Topic | None) -> None:
        if operation is Operation.SEND:
            raise StoreUnavailable("broker", "away")

    world.broker.before_call = away
    answer = await world.call(timeout_seconds=0.01)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert world.keys() == []
