"""The twin of the broker, in memory: for tests that need no server, held to the same contract suite."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from infra.errors import StoreUnavailable
from infra.kafka.interface import GroupReader, Message, PartitionLag, Producer, Record, next_offsets
from infra.kafka.limits import check_size
from schemas.topics import Topic

STORE_NAME = "broker"
RECORDS_AT_ONCE = 500


class Operation(StrEnum):
    ENSURE_TOPICS = "ensure_topics"
    SEND = "send"
    OFFSETS = "offsets"
    LAG = "lag"
    TIME_OF = "time_of"
    READ = "read"
    CONSUME = "consume"
    COMMIT = "commit"
    CHECK = "check"


FaultHook = Callable[[Operation, Topic | None], Awaitable[None]]
"""Awaited before each operation (a reader: before each list it yields), with its topic if it has one. May raise or wait."""


async def _no_fault(operation: Operation, topic: Topic | None) -> None:
    return None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class _Partition:
    """`records` from `begin` on; what retention removed is gone from its front."""

    begin: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.begin + len(self.records)

    def from_offset(self, offset: int) -> list[Record]:
        return self.records[max(0, offset - self.begin) :]


class MemoryBroker:
    """See Broker. One key always lies in one partition. `before_call` may be set at any time."""

    def __init__(
        self, *topics: Topic, partitions: int = 4, idle_seconds: float = 1.0, now_ms: Callable[[], int] = _now_ms
    ) -> None:
        self.before_call: FaultHook = _no_fault
        self._idle_seconds = idle_seconds
        self._now_ms = now_ms
        self._topics: dict[str, list[_Partition]] = {}
        self._committed: dict[tuple[str, str, int], int] = {}
        self._members: dict[tuple[str, str], list[_MemoryGroupReader]] = {}
        self._written = asyncio.Condition()
        self._make(topics, partitions)

    async def ensure_topics(self, topics: Sequence[Topic], *, partitions: int, replication: int) -> None:
        await self.before_call(Operation.ENSURE_TOPICS, None)
        self._make(topics, partitions)

    async def producer(self) -> Producer:
        return _MemoryProducer(self)

    async def send(self, topic: Topic, messages: Sequence[Message]) -> None:
        """What its producers do."""
        for message in messages:
            check_size(topic, message)
        await self.before_call(Operation.SEND, topic)
        partitions = self._partitions(topic)
        async with self._written:
            for message in messages:
                number = zlib.crc32(message.key) % len(partitions)
                partition = partitions[number]
                partition.records.append(
                    Record(number, partition.end, self._now_ms(), message.key, message.value, dict(message.headers))
                )
            self._written.notify_all()

    async def offsets(self, topic: Topic) -> dict[int, tuple[int, int]]:
        await self.before_call(Operation.OFFSETS, topic)
        return {number: (partition.begin, partition.end) for number, partition in enumerate(self._partitions(topic))}

    async def lag(self, topic: Topic, group: str) -> list[PartitionLag]:
        await self.before_call(Operation.LAG, topic)
        return [
            PartitionLag(
                number,
                begin=partition.begin,
                committed=self._committed.get((group, topic.name, number), partition.begin),
                end=partition.end,
            )
            for number, partition in enumerate(self._partitions(topic))
        ]

    async def time_of(self, topic: Topic, partition: int, offset: int) -> int | None:
        await self.before_call(Operation.TIME_OF, topic)
        partitions = self._partitions(topic)
        if not 0 <= partition < len(partitions):
            return None
        found = partitions[partition].from_offset(offset)
        return found[0].time_ms if found else None

    @asynccontextmanager
    async def read(self, topic: Topic, start: Mapping[int, int]) -> AsyncIterator[AsyncIterator[list[Record]]]:
        partitions = self._partitions(topic)
        positions = {
            number: min(max(start.get(number, partition.end), partition.begin), partition.end)
            for number, partition in enumerate(partitions)
        }
        async with aclosing(self._batches(topic, positions)) as batches:
            yield batches

    @asynccontextmanager
    async def consume(self, topic: Topic, group: str) -> AsyncIterator[GroupReader]:
        self._partitions(topic)
        members = self._members.setdefault((group, topic.name), [])
        reader = _MemoryGroupReader(self, topic, group)
        members.append(reader)
        self._rebalance(topic, group)
        try:
            yield reader
        finally:
            members.remove(reader)
            self._rebalance(topic, group)

    async def check(self) -> None:
        await self.before_call(Operation.CHECK, None)

    async def close(self) -> None:
        return None

    def commit(self, topic: Topic, group: str, offsets: Mapping[int, int]) -> None:
        """For tests: what a worker of this group would have committed, the next offset of each partition."""
        for number, offset in offsets.items():
            self._committed[group, topic.name, number] = offset

    def remove_before(self, topic: Topic, partition: int, offset: int) -> None:
        """For tests: what retention does."""
        found = self._partitions(topic)[partition]
        kept = found.from_offset(offset)
        found.begin = found.end - len(kept)
        found.records = kept

    def records(self, topic: Topic) -> list[Record]:
        """For tests: everything that is there, partition by partition."""
        return [record for partition in self._partitions(topic) for record in partition.records]

    def _rebalance(self, topic: Topic, group: str) -> None:
        """Who owns what is dealt out anew, and all begin behind the last commit."""
        members = self._members[group, topic.name]
        for place, member in enumerate(members):
            member.positions = {
                number: self._committed.get((group, topic.name, number), partition.begin)
                for number, partition in enumerate(self._partitions(topic))
                if number % len(members) == place
            }

    def _make(self, topics: Sequence[Topic], partitions: int) -> None:
        for topic in topics:
            self._topics.setdefault(topic.name, [_Partition() for _ in range(partitions)])

    def _partitions(self, topic: Topic) -> list[_Partition]:
        if topic.name not in self._topics:
            raise StoreUnavailable(STORE_NAME, f"the topic {topic.name} is missing: run `image-search upgrade`")
        return self._topics[topic.name]

    async def _batches(self, topic: Topic, positions: dict[int, int]) -> AsyncGenerator[list[Record]]:
        while True:
            await self.before_call(Operation.READ, topic)
            yield await self.take(topic, positions)

    async def take(self, topic: Topic, positions: dict[int, int]) -> list[Record]:
        """What its readers do: what is there from these positions on, which move; waits a little when there is nothing."""
        if not (found := self._take(topic, positions)):
            await self._wait_for_more(topic, positions)
            found = self._take(topic, positions)
        return found

    def _take(self, topic: Topic, positions: dict[int, int]) -> list[Record]:
        found: list[Record] = []
        partitions = self._partitions(topic)
        for number in positions:
            records = partitions[number].from_offset(positions[number])[: RECORDS_AT_ONCE - len(found)]
            if records:
                positions[number] = records[-1].offset + 1
                found += records
        return found

    async def _wait_for_more(self, topic: Topic, positions: Mapping[int, int]) -> None:
        def more() -> bool:
            partitions = self._partitions(topic)
            return any(partitions[number].end > position for number, position in positions.items())

        try:
            async with asyncio.timeout(self._idle_seconds), self._written:
                await self._written.wait_for(more)
        except TimeoutError:
            return


class _MemoryProducer:
    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def send(self, topic: Topic, messages: Sequence[Message]) -> None:
        await self._broker.send(topic, messages)

    async def close(self) -> None:
        return None


class _MemoryGroupReader:
    def __init__(self, broker: MemoryBroker, topic: Topic, group: str) -> None:
        self.positions: dict[int, int] = {}
        self._broker = broker
        self._topic = topic
        self._group = group

    async def batch(self) -> list[Record]:
        await self._broker.before_call(Operation.CONSUME, self._topic)
        return await self._broker.take(self._topic, self.positions)

    async def commit(self, records: Sequence[Record]) -> None:
        await self._broker.before_call(Operation.COMMIT, self._topic)
        mine = {number: offset for number, offset in next_offsets(records).items() if number in self.positions}
        self._broker.commit(self._topic, self._group, mine)
