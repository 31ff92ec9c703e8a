"""What the Kafka adapter does when its broker is away, comes back, or forgets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import pytest
from aiokafka import TopicPartition  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete  # type: ignore[import-untyped]  # aiokafka ships no types

from infra import kafka
from infra.errors import StoreUnavailable
from infra.kafka.interface import Broker, Message, Producer, Record
from infra.settings import CommonSettings
from schemas.topics import OBJECTS, PROCESSOR_GROUP
from tests.conftest import FreshSettings, Servers

TIMEOUT_SECONDS = 3.0


@pytest.fixture
def settings(fresh_settings: FreshSettings) -> CommonSettings:
    return fresh_settings(CommonSettings, kafka_timeout_seconds=TIMEOUT_SECONDS)


@pytest.fixture
async def broker(settings: CommonSettings, servers: Servers) -> AsyncIterator[Broker]:
    await servers.stack.wait_ready("kafka")
    broker = await kafka.connect(settings)
    await broker.ensure_topics([OBJECTS], partitions=1, replication=1)
    yield broker
    await broker.close()


@pytest.fixture
async def producer(broker: Broker) -> AsyncIterator[Producer]:
    producer = await broker.producer()
    yield producer
    await producer.close()


def message(text: str) -> Message:
    return Message(b"k", text.encode())


async def values(broker: Broker) -> list[str]:
    """Everything that the topic holds."""
    _, end = (await broker.offsets(OBJECTS))[0]
    found: list[Record] = []
    async with asyncio.timeout(20), broker.read(OBJECTS, {0: 0}) as batches:
        while len(found) < end:
            found += await anext(batches)
    return [record.value.decode() for record in found]


async def test_attempts_while_the_broker_is_away_do_not_pile_up(broker: Broker, producer: Producer, servers: Servers) -> None:
    await producer.send(OBJECTS, [message("before")])
    async with servers.stack.paused("kafka"):
        for attempt in range(4):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await producer.send(OBJECTS, [message(f"attempt {attempt}"), message(f"{attempt} too")])
            assert time.monotonic() - started < 2 * TIMEOUT_SECONDS
    await servers.stack.wait_ready("kafka")
    await producer.send(OBJECTS, [message("after")])
    assert await values(broker) == ["before", "attempt 0", "0 too", "after"]


async def test_a_send_outlasts_a_restart_that_is_shorter_than_its_time_out(
    fresh_settings: FreshSettings, servers: Servers
) -> None:
    broker = await kafka.connect(fresh_settings(CommonSettings, kafka_timeout_seconds=60))
    await broker.ensure_topics([OBJECTS], partitions=1, replication=1)
    producer = await broker.producer()
    await producer.send(OBJECTS, [message("before")])
    async with servers.stack.paused("kafka"):
        sending = asyncio.ensure_future(producer.send(OBJECTS, [message("during")]))
        await asyncio.sleep(1)
        assert not sending.done()
    await sending
    assert await values(broker) == ["before", "during"]
    await producer.close()
    await broker.close()


async def test_questions_fail_while_the_broker_is_away_and_are_answered_when_it_is_back(
    broker: Broker, producer: Producer, servers: Servers
) -> None:
    await producer.send(OBJECTS, [message("before")])
    assert await broker.time_of(OBJECTS, 0, 0) is not None
    async with servers.stack.paused("kafka"):
        for call in (
            broker.check(),
            broker.offsets(OBJECTS),
            broker.lag(OBJECTS, PROCESSOR_GROUP),
            broker.time_of(OBJECTS, 0, 0),
            broker.ensure_topics([OBJECTS], partitions=1, replication=1),
        ):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await call
            assert time.monotonic() - started < 3 * TIMEOUT_SECONDS
    await servers.stack.wait_ready("kafka")
    await broker.check()
    assert await broker.offsets(OBJECTS) == {0: (0, 1)}
    assert [lag.pending for lag in await broker.lag(OBJECTS, PROCESSOR_GROUP)] == [1]
    assert await broker.time_of(OBJECTS, 0, 0) is not None


async def test_a_reader_outlives_a_restart(fresh_settings: FreshSettings, servers: Servers) -> None:
    broker = await kafka.connect(fresh_settings(CommonSettings, kafka_timeout_seconds=60))
    await broker.ensure_topics([OBJECTS], partitions=1, replication=1)
    producer = await broker.producer()
    async with asyncio.timeout(90), broker.read(OBJECTS, {0: 0}) as batches:
        await producer.send(OBJECTS, [message("before")])
        found = await anext(batches)
        async with servers.stack.paused("kafka"):
            assert await anext(batches) == []
        await servers.stack.wait_ready("kafka")
        await producer.send(OBJECTS, [message("after")])
        while len(found) < 2:
            found += await anext(batches)
    assert [record.value for record in found] == [b"before", b"after"]
    await producer.close()
    await broker.close()


async def test_a_reader_says_so_when_its_broker_stays_away(broker: Broker, servers: Servers) -> None:
    async with broker.read(OBJECTS, {}) as batches:
        assert await anext(batches) == []
        async with servers.stack.paused("kafka"):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                async for found in batches:
                    assert found == []
            assert time.monotonic() - started < 4 * TIMEOUT_SECONDS
    await servers.stack.wait_ready("kafka")


async def test_a_slow_reader_goes_on_behind_what_retention_removed(
    broker: Broker, producer: Producer, settings: CommonSettings
) -> None:
    large = "x" * 900_000  # more than one of them is not fetched ahead
    for number in range(6):
        await producer.send(OBJECTS, [message(f"{number}{large}")])
    async with asyncio.timeout(30), broker.read(OBJECTS, {0: 0}) as batches:
        offsets = [record.offset for record in await anext(batches)]
        admin = AIOKafkaAdminClient(bootstrap_servers=list(settings.kafka_bootstrap))
        await admin.start()
        place = TopicPartition(OBJECTS.full_name(settings.kafka_topic_prefix), 0)
        await admin.delete_records({place: RecordsToDelete(before_offset=5)})
        await admin.close()
        while 5 not in offsets:
            offsets += [record.offset for record in await anext(batches)]
        await producer.send(OBJECTS, [message("news")])
        while 6 not in offsets:
            offsets += [record.offset for record in await anext(batches)]
    assert offsets == sorted(set(offsets))
    assert 4 not in offsets  # the fault was real: something had been removed under the reader


async def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    broker = await kafka.connect(CommonSettings(kafka_bootstrap=(address,)))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=address):
        await broker.check()
    with pytest.raises(StoreUnavailable):
        await (await broker.producer()).send(OBJECTS, [message("x")])
    with pytest.raises(StoreUnavailable):
        async with broker.read(OBJECTS, {}):
            pass
    assert time.monotonic() - started < 5
    await broker.close()


async def test_a_server_that_says_nothing_is_unavailable_within_the_time_out() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    broker = await kafka.connect(CommonSettings(kafka_bootstrap=(address,), kafka_timeout_seconds=0.5))
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await broker.check()
    await broker.close()
    server.close()
