"""Turns notifications on their topic into object events: nothing is committed before the broker has what came of it.

Several bridges share the topic by a consumer group. What one of them read and did not commit is read again by another: a
notification may become two events, and workers drop the second.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import structlog

from infra.errors import InvalidEvent, StoreUnavailable, TransientError
from infra.kafka.interface import Broker, GroupReader, Message, Producer, Record
from infra.metrics import DEAD_LETTERS as DEAD_LETTERS_COUNTED
from infra.metrics import NOTIFICATION_RECORDS, RETRIES
from infra.retry import until_done
from ingest_bridge.announcing import Source, announced
from ingest_bridge.notifications.s3 import Notification, parse_message
from schemas.events import ObjectEvent
from schemas.topics import (
    DEAD_LETTERS,
    HEADER_ATTEMPT,
    HEADER_ERROR,
    HEADER_OFFSET,
    HEADER_PARTITION,
    HEADER_REASON,
    HEADER_TOPIC,
    OBJECT_NOTIFICATIONS,
    OBJECTS,
    RELAY_GROUP,
)

log = structlog.get_logger(__name__)

FIRST_RESTART_SECONDS = 0.2
LONGEST_RESTART_SECONDS = 5.0
REMEMBERED_IDS = 16_384


class Relay:
    """`on_gap` is called when a change may have been missed: a scan has to look. It must not block."""

    def __init__(
        self,
        *,
        deployment: str,
        buckets: Sequence[str],
        broker: Broker,
        producer: Producer,
        on_gap: Callable[[], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._deployment = deployment
        self._buckets = frozenset(buckets)
        self._broker = broker
        self._producer = producer
        self._on_gap = on_gap
        self._sleep = sleep
        self._reading = False
        self._remembered: OrderedDict[str, None] = OrderedDict()

    async def check(self) -> None:
        if not self._reading:
            raise StoreUnavailable("notifications", "they are not being read just now")

    async def run(self) -> None:
        """Relay for ever. Whatever the broker does, it comes back to it."""
        wait_seconds = FIRST_RESTART_SECONDS
        while True:
            try:
                await self._relay()
            except TransientError as error:
                log.warning("the notifications are taken up again", reason=str(error))
            if self._reading:
                wait_seconds = FIRST_RESTART_SECONDS
            self._reading = False
            await self._sleep(wait_seconds * random.uniform(0.75, 1.0))  # noqa: S311 - jitter, not a secret
            wait_seconds = min(2 * wait_seconds, LONGEST_RESTART_SECONDS)

    async def _relay(self) -> None:
        """Until the broker fails (TransientError)."""
        async with self._broker.consume(OBJECT_NOTIFICATIONS, RELAY_GROUP) as reader:
            while True:
                records = await reader.batch()
                self._reading = True
                if records:
                    await self._hand_over(records)
                    await self._commit(reader, records)

    async def _commit(self, reader: GroupReader, records: Sequence[Record]) -> None:
        try:
            await reader.commit(records)
        except TransientError as error:
            # The next commit covers these too. Were there none, they would be read again and dropped by their ids.
            log.warning("a commit failed", reason=str(error))

    async def _hand_over(self, records: Sequence[Record]) -> None:
        """One send for all that was read, in the order of reading."""
        events: dict[str, ObjectEvent] = {}
        refused: list[Message] = []
        for record in records:
            try:
                parsed = parse_message(record.value, deployment=self._deployment, buckets=self._buckets)
            except InvalidEvent as error:
                refused.append(_dead_letter(record, error))
                DEAD_LETTERS_COUNTED.labels(error.reason).inc()
                continue
            count_records(parsed)
            # A store announces a change by two ways, so that none is lost: the second copy says nothing new.
            events.update((event.id, event) for event in parsed.events if event.id not in self._remembered)
        if events:
            await write_events(self._producer, events.values(), Source.TOPIC)
            self._remember(events)
        if refused:
            await until_done(lambda: self._producer.send(DEAD_LETTERS, refused), on_wait=_broker_waited_for)
            # What could not be understood may have been a change.
            self._on_gap()

    def _remember(self, ids: Iterable[str]) -> None:
        self._remembered.update(dict.fromkeys(ids))
        while len(self._remembered) > REMEMBERED_IDS:
            self._remembered.popitem(last=False)


async def write_events(producer: Producer, events: Collection[ObjectEvent], source: Source) -> None:
    """Returns when the broker has them, however long it is away."""
    with announced(events, source) as messages:
        await until_done(lambda: producer.send(OBJECTS, messages), on_wait=_broker_waited_for)


def count_records(parsed: Notification) -> None:
    NOTIFICATION_RECORDS.labels("passed").inc(len(parsed.events))
    NOTIFICATION_RECORDS.labels("unknown_name").inc(parsed.unknown_names)
    NOTIFICATION_RECORDS.labels("foreign_bucket").inc(parsed.foreign)
    NOTIFICATION_RECORDS.labels("no_change").inc(parsed.no_change)
    NOTIFICATION_RECORDS.labels("reserved_key").inc(parsed.reserved)


def _broker_waited_for(error: TransientError, attempt: int) -> None:
    RETRIES.labels("broker").inc()
    log.warning("waiting for the broker", reason=str(error), attempt=attempt)


def _dead_letter(record: Record, error: InvalidEvent) -> Message:
    headers = {
        HEADER_TOPIC: OBJECT_NOTIFICATIONS.name,
        HEADER_PARTITION: str(record.partition),
        HEADER_OFFSET: str(record.offset),
        HEADER_REASON: error.reason,
        HEADER_ERROR: str(error),
        HEADER_ATTEMPT: "1",
    }
    return Message(record.key, record.value, headers)
