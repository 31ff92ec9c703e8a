"""Reading a topic as a member of a consumer group: several processes share its partitions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import CommitFailedError, KafkaError  # type: ignore[import-untyped]  # aiokafka ships no types

from infra.kafka.admin import Inspector
from infra.kafka.connection import STORE_NAME, Connection
from infra.kafka.interface import GroupReader, Record, next_offsets
from infra.kafka.reader import IDLE_MS, RECORDS_AT_ONCE, record_of
from infra.metrics import store_error
from schemas.topics import Topic

SESSION_MS = 10_000
HEARTBEAT_MS = 3_000
# A member that waits for a broker to take what it makes of a batch must not be put out for it: it beats all the while.
MAX_POLL_INTERVAL_MS = 24 * 3600 * 1000

log = structlog.get_logger(__name__)


@asynccontextmanager
async def consuming(connection: Connection, inspector: Inspector, topic: Topic, group: str) -> AsyncIterator[GroupReader]:
    """See Broker.consume."""
    await inspector.partitions(topic)  # a missing topic would be made by a broker that creates topics by itself
    consumer = AIOKafkaConsumer(
        connection.topic(topic),
        **connection.options,
        group_id=connection.group(group),
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # the library's own default would skip what came before the first commit
        max_poll_records=RECORDS_AT_ONCE,
        session_timeout_ms=SESSION_MS,
        heartbeat_interval_ms=HEARTBEAT_MS,
        max_poll_interval_ms=MAX_POLL_INTERVAL_MS,
        rebalance_timeout_ms=SESSION_MS,
    )
    try:
        async with connection.bounded():
            await consumer.start()
        yield KafkaGroupReader(connection, inspector, consumer, topic, group)
    finally:
        await connection.consumer_ended(consumer)


class KafkaGroupReader:
    """See GroupReader."""

    def __init__(
        self, connection: Connection, inspector: Inspector, consumer: AIOKafkaConsumer, topic: Topic, group: str
    ) -> None:
        self._connection = connection
        self._inspector = inspector
        self._consumer = consumer
        self._topic = topic
        self._group = group
        self._idle_seconds = 0.0
        self._pending: dict[int, int] = {}

    async def batch(self) -> list[Record]:
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        try:
            found = await self._consumer.getmany(timeout_ms=IDLE_MS)
        except (KafkaError, OSError) as error:
            raise store_error(STORE_NAME, f"reading failed ({type(error).__name__})") from error
        # Only waiting counts: what the reader's own work takes between two batches is no silence of the broker.
        self._idle_seconds = 0.0 if found else self._idle_seconds + clock() - asked_at
        if found:
            self._pending = {}
        elif self._idle_seconds > self._connection.timeout_seconds:
            self._idle_seconds = 0.0
            await self._check_not_stuck()
        return [record_of(message) for messages in found.values() for message in messages]

    async def commit(self, records: Sequence[Record]) -> None:
        name = self._connection.topic(self._topic)
        offsets = {TopicPartition(name, partition): offset for partition, offset in next_offsets(records).items()}
        async with self._connection.bounded():
            owned = self._consumer.assignment()
            mine = {tp: offset for tp, offset in offsets.items() if tp in owned}
            if not mine:
                return
            try:
                await self._consumer.commit(mine)
            except CommitFailedError:
                log.info("the group moved on before a commit; another member reads again", topic=name)

    async def _check_not_stuck(self) -> None:
        """Some consumers never come back after a restart of their broker, and do not say so: ask it, rather than wait for ever.

        Seen from the group, because a member that is stuck in joining owns nothing that it could be behind with.
        """
        lags = await self._inspector.lag(self._topic, self._group)
        pending = {lag.partition: lag.committed for lag in lags if lag.pending}
        stuck = pending.items() & self._pending.items()
        self._pending = pending
        if stuck:
            seconds = self._connection.timeout_seconds
            raise store_error(STORE_NAME, f"nobody of the group read on for {seconds:g} s although there is more")
