"""Following a topic without a group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import OffsetOutOfRangeError  # type: ignore[import-untyped]  # aiokafka ships no types

from infra.kafka.admin import Inspector, begin_and_end
from infra.kafka.connection import STORE_NAME, Connection
from infra.kafka.interface import Record
from infra.metrics import store_error
from schemas.topics import Topic

IDLE_MS = 1000
RECORDS_AT_ONCE = 500


@asynccontextmanager
async def reading(
    connection: Connection, inspector: Inspector, topic: Topic, start: Mapping[int, int]
) -> AsyncIterator[AsyncIterator[list[Record]]]:
    """See Broker.read."""
    partitions = await inspector.partitions(topic)
    consumer = AIOKafkaConsumer(
        **connection.options,
        enable_auto_commit=False,
        auto_offset_reset="none",  # where to go on is decided here: see _place
        max_poll_records=RECORDS_AT_ONCE,
    )
    try:
        async with connection.bounded():
            await consumer.start()
            offsets = await begin_and_end(consumer, partitions)
            consumer.assign(partitions)
            _place(consumer, offsets, {tp: start.get(tp.partition, offsets[tp.partition][1]) for tp in partitions})
        async with aclosing(_batches(connection, consumer, partitions)) as batches:
            yield batches
    finally:
        await connection.consumer_ended(consumer)


async def _batches(
    connection: Connection, consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]
) -> AsyncGenerator[list[Record]]:
    clock = asyncio.get_running_loop().time
    heard_at = clock()
    while True:
        try:
            found = await consumer.getmany(timeout_ms=IDLE_MS)
        except OffsetOutOfRangeError:
            # Removed by retention while the reader was slow, or lost with a broker.
            async with connection.bounded():
                positions = {tp: await consumer.position(tp) for tp in partitions}
                _place(consumer, await begin_and_end(consumer, partitions), positions)
            continue
        if found:
            heard_at = clock()
        elif clock() - heard_at > connection.timeout_seconds:
            await _check_not_stuck(connection, consumer, partitions)
            heard_at = clock()
        yield [record_of(message) for messages in found.values() for message in messages]


def _place(consumer: AIOKafkaConsumer, offsets: Mapping[int, tuple[int, int]], wanted: Mapping[TopicPartition, int]) -> None:
    for tp, position in wanted.items():
        begin, end = offsets[tp.partition]
        consumer.seek(tp, min(max(position, begin), end))


async def _check_not_stuck(connection: Connection, consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> None:
    """A consumer hides that its broker is away, and some never come back after its restart: ask, rather than wait for ever."""
    async with connection.bounded():
        offsets = await begin_and_end(consumer, partitions)
        behind = [tp.partition for tp in partitions if await consumer.position(tp) < offsets[tp.partition][1]]
    if behind:
        raise store_error(STORE_NAME, f"nothing came for {connection.timeout_seconds:g} s although there is more")


def record_of(message: ConsumerRecord) -> Record:
    return Record(
        partition=message.partition,
        offset=message.offset,
        time_ms=message.timestamp,
        key=message.key or b"",
        value=message.value or b"",
        headers={name: (value or b"").decode("utf-8", "replace") for name, value in message.headers},
    )
