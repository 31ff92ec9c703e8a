"""Asking the broker about topics, offsets and groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import (  # type: ignore[import-untyped]  # aiokafka ships no types
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    NotCoordinatorError,
    TopicAlreadyExistsError,
    for_code,
)

from infra.kafka.connection import STORE_NAME, Connection
from infra.kafka.interface import PartitionLag
from infra.metrics import store_error
from schemas.topics import Topic

RETRY_SECONDS = 0.1
_COORDINATOR_MOVES = (CoordinatorLoadInProgressError, CoordinatorNotAvailableError, NotCoordinatorError)


class Inspector:
    """One admin client and one consumer without a group, started when first needed and replaced after a failure."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._admin = KeptClient(self._start_admin, lambda admin: connection.ended(admin.close()))
        self._consumer = KeptClient(self._start_consumer, connection.consumer_ended)
        self._looking = asyncio.Lock()

    async def check(self) -> None:
        async with self._connection.bounded(), self._admin.use() as admin:
            await admin.describe_cluster()

    async def ensure_topics(self, topics: Sequence[Topic], *, partitions: int, replication: int) -> None:
        async with self._connection.bounded(), self._admin.use() as admin:
            present = set(await admin.list_topics())
            missing = [topic for topic in topics if self._connection.topic(topic) not in present]
            if missing:
                await self._create(admin, missing, partitions, replication)
            await self._wait_for_leaders(admin, topics)

    async def partitions(self, topic: Topic) -> list[TopicPartition]:
        """Raises StoreUnavailable when the topic is missing."""
        name = self._connection.topic(topic)
        async with self._connection.bounded(), self._admin.use() as admin:
            for found in await _described(admin):
                if found["topic"] == name and found["partitions"]:
                    return [TopicPartition(name, number) for number in sorted(p["partition"] for p in found["partitions"])]
        raise self._connection.missing(topic)

    async def offsets(self, topic: Topic) -> dict[int, tuple[int, int]]:
        partitions = await self.partitions(topic)
        async with self._connection.bounded(), self._consumer.use() as consumer:
            return await begin_and_end(consumer, partitions)

    async def lag(self, topic: Topic, group: str) -> list[PartitionLag]:
        partitions = await self.partitions(topic)
        # Commits before ends: what is written in between counts as pending, never as done.
        async with self._connection.bounded(), self._admin.use() as admin:
            committed = await _committed(admin, self._connection.group(group), partitions)
        async with self._connection.bounded(), self._consumer.use() as consumer:
            offsets = await begin_and_end(consumer, partitions)
        return [
            PartitionLag(number, begin=begin, committed=committed.get(number, begin), end=end)
            for number, (begin, end) in offsets.items()
        ]

    async def time_of(self, topic: Topic, partition: int, offset: int) -> int | None:
        found = next((tp for tp in await self.partitions(topic) if tp.partition == partition), None)
        if found is None:
            return None
        async with self._looking, self._connection.bounded(), self._consumer.use() as consumer:
            begin, end = (await begin_and_end(consumer, [found]))[partition]
            if offset >= end:
                return None
            consumer.assign([found])
            consumer.seek(found, max(offset, begin))
            try:
                return int((await consumer.getone(found)).timestamp)
            finally:
                consumer.pause(found)  # or it would go on fetching what nobody reads

    async def close(self) -> None:
        await self._admin.close()
        await self._consumer.close()

    async def _create(self, admin: AIOKafkaAdminClient, topics: Iterable[Topic], partitions: int, replication: int) -> None:
        wanted = [
            NewTopic(self._connection.topic(topic), partitions, replication, topic_configs=topic.settings) for topic in topics
        ]
        answer = await admin.create_topics(wanted)
        for name, code, *_ in answer.topic_errors:
            if code and for_code(code) is not TopicAlreadyExistsError:
                raise store_error(STORE_NAME, f"it refused to create the topic {name} ({for_code(code).__name__})")

    async def _wait_for_leaders(self, admin: AIOKafkaAdminClient, topics: Iterable[Topic]) -> None:
        """Only with a leader can a partition be written to and read from."""
        while True:
            leaders = {found["topic"]: [p["leader"] for p in found["partitions"]] for found in await _described(admin)}
            if all(leaders.get(name) and -1 not in leaders[name] for name in map(self._connection.topic, topics)):
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _start_admin(self) -> AIOKafkaAdminClient:
        admin = AIOKafkaAdminClient(**self._connection.options)
        try:
            await admin.start()
        except BaseException:
            await self._connection.ended(admin.close())
            raise
        return admin

    async def _start_consumer(self) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            **self._connection.options,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # a record that was removed since its offset was asked for
            max_partition_fetch_bytes=1,  # only ever used to look at one record; the broker sends at least one batch
        )
        try:
            await consumer.start()
        except BaseException:
            await self._connection.consumer_ended(consumer)
            raise
        return consumer


class KeptClient:
    """A client that is kept for as long as it works. After a failure it is ended, and the next use starts another."""

    def __init__(self, start: Callable[[], Awaitable[Any]], end: Callable[[Any], Awaitable[None]]) -> None:
        self._start = start
        self._end = end
        self._client: Any = None
        self._starting = asyncio.Lock()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Any]:
        async with self._starting:
            if self._client is None:
                self._client = await self._start()
            client = self._client
        try:
            yield client
        except BaseException:
            if self._client is client:
                self._client = None
                await self._end(client)
            raise

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await self._end(client)


async def begin_and_end(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> dict[int, tuple[int, int]]:
    begins = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    return {tp.partition: (begins[tp], ends[tp]) for tp in partitions}


async def _described(admin: AIOKafkaAdminClient) -> list[dict[str, Any]]:
    # All topics, because asking for one by name makes it on a broker that creates topics by itself.
    found: list[dict[str, Any]] = await admin.describe_topics()
    return found


async def _committed(admin: AIOKafkaAdminClient, group: str, partitions: Sequence[TopicPartition]) -> dict[int, int]:
    """The commits of a group, without the partitions that have none.

    A broker that has just started answers that the group's coordinator is not there yet, or names no partition at all, which
    must not be taken for "nothing committed". Tried again until the caller's time-out.
    """
    while True:
        try:
            found = await admin.list_consumer_group_offsets(group, partitions=list(partitions))
        except _COORDINATOR_MOVES:
            found = {}
        if set(partitions) <= set(found):
            return {tp.partition: found[tp].offset for tp in partitions if found[tp].offset >= 0}
        await asyncio.sleep(RETRY_SECONDS)
