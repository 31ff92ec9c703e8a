"""What we need of the broker, beside the worker's own consumer (Faust: processors/app.py).

`client.py` is the real adapter, `memory.py` the twin; one contract suite holds both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from schemas.topics import Topic


@dataclass(frozen=True, slots=True)
class Message:
    """Something to write. `key` decides the partition; `headers` are text."""

    key: bytes
    value: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """Something read. `time_ms` is when it was written, milliseconds since 1970-01-01 UTC."""

    partition: int
    offset: int
    time_ms: int
    key: bytes
    value: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """`end` is the next offset to be written, `committed` the next to be worked on by the group (begin if none)."""

    partition: int
    begin: int
    committed: int
    end: int

    @property
    def pending(self) -> int:
        return max(0, self.end - max(self.committed, self.begin))


def next_offsets(records: Iterable[Record]) -> dict[int, int]:
    """What a group commits for these records: the offset behind the last of each partition."""
    behind: dict[int, int] = {}
    for record in records:
        behind[record.partition] = max(behind.get(record.partition, 0), record.offset + 1)
    return behind


class Producer(Protocol):
    async def send(self, topic: Topic, messages: Sequence[Message]) -> None:
        """Returns when the broker has all of them (acks=all, idempotent). Calls may overlap.

        Raises StoreUnavailable after its time-out: then each may or may not be there, and is sent again. Raises InvalidEvent
        for a message above the topic's `max_message_bytes`: then none was sent.
        """

    async def close(self) -> None: ...


class GroupReader(Protocol):
    """A member of a consumer group. After StoreUnavailable leave it and consume anew: what was not committed comes again."""

    async def batch(self) -> list[Record]:
        """What came in this member's partitions, in offset order within each; empty about every second when nothing did."""

    async def commit(self, records: Sequence[Record]) -> None:
        """These are done with, and all before them in their partitions: hand over no record before those in front of it.

        Partitions that went to another member meanwhile are left out: that member reads their records again.
        """


class Broker(Protocol):
    """Every method raises StoreUnavailable."""

    async def ensure_topics(self, topics: Sequence[Topic], *, partitions: int, replication: int) -> None:
        """Create what is missing; leave what is there."""

    async def producer(self) -> Producer: ...

    async def offsets(self, topic: Topic) -> dict[int, tuple[int, int]]:
        """Begin and end offset of each partition."""

    async def lag(self, topic: Topic, group: str) -> list[PartitionLag]: ...

    async def time_of(self, topic: Topic, partition: int, offset: int) -> int | None:
        """`time_ms` of the record at this offset or the first one behind it; None when there is none."""

    def read(self, topic: Topic, start: Mapping[int, int]) -> AbstractAsyncContextManager[AsyncIterator[list[Record]]]:
        """Follow all partitions from these offsets (missing: from the end; below the oldest: from the oldest), for ever.

        Yields what came, in offset order within a partition; an empty list about every second when nothing did, so that
        a reader can do other things. No consumer group, nothing is committed.
        """

    def consume(self, topic: Topic, group: str) -> AbstractAsyncContextManager[GroupReader]:
        """Join a group that shares the topic's partitions. Begins behind its last commit, without one at the oldest record.

        Nothing is committed but by `commit`. Leaving gives the partitions to the others at once.
        """

    async def check(self) -> None: ...

    async def close(self) -> None: ...
