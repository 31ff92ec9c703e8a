"""The broker over aiokafka."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from infra.kafka.admin import Inspector
from infra.kafka.connection import Connection
from infra.kafka.group import consuming
from infra.kafka.interface import GroupReader, PartitionLag, Producer, Record
from infra.kafka.producer import KafkaProducer
from infra.kafka.reader import reading
from infra.settings import CommonSettings
from schemas.topics import Topic


class KafkaBroker:
    """See Broker. Connects when first used."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inspector = Inspector(connection)

    @classmethod
    def from_settings(cls, settings: CommonSettings) -> KafkaBroker:
        return cls(Connection.from_settings(settings))

    async def ensure_topics(self, topics: Sequence[Topic], *, partitions: int, replication: int) -> None:
        await self._inspector.ensure_topics(topics, partitions=partitions, replication=replication)

    async def producer(self) -> Producer:
        return KafkaProducer(self._connection, self._inspector)

    async def offsets(self, topic: Topic) -> dict[int, tuple[int, int]]:
        return await self._inspector.offsets(topic)

    async def lag(self, topic: Topic, group: str) -> list[PartitionLag]:
        return await self._inspector.lag(topic, group)

    async def time_of(self, topic: Topic, partition: int, offset: int) -> int | None:
        return await self._inspector.time_of(topic, partition, offset)

    def read(self, topic: Topic, start: Mapping[int, int]) -> AbstractAsyncContextManager[AsyncIterator[list[Record]]]:
        return reading(self._connection, self._inspector, topic, start)

    def consume(self, topic: Topic, group: str) -> AbstractAsyncContextManager[GroupReader]:
        return consuming(self._connection, self._inspector, topic, group)

    async def check(self) -> None:
        await self._inspector.check()

    async def close(self) -> None:
        await self._inspector.close()
