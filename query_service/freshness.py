"""Up to when everything is findable: `indexed_through`, kept up to date in the background so that a search pays nothing.

It is the least of: for each partition of the objects topic, now if nothing waits there, else the time of the first event
that waits; for each bucket, how far its store's change log has been handed over, or for a store that sends notifications the
same of the partitions of their topic. Less the time that an acknowledged vector needs to be found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from infra.errors import StoreUnavailable
from infra.kafka.interface import Broker, PartitionLag
from infra.metadata_store.interface import MetadataStore
from infra.metrics import INDEXED_THROUGH_LAG_SECONDS, OBJECTS_LAG
from schemas.api import FreshnessStatus, TopicLag, time_of_us
from schemas.tables import log_cursor_name
from schemas.topics import OBJECT_NOTIFICATIONS, OBJECTS, RELAY_GROUP, Topic

REFRESH_SECONDS = 1.0

log = structlog.get_logger(__name__)


class Freshness(Protocol):
    def status(self) -> FreshnessStatus: ...


class FreshnessFollower:
    """Never goes back. While a store does not answer, the value stands still and `reason` says which store it is.

    `notified`: the stores announce changes on the notification topic, and no change log is followed.
    """

    def __init__(
        self,
        *,
        broker: Broker,
        metadata: MetadataStore,
        buckets: Callable[[], Awaitable[Sequence[str]]],
        group: str,
        visibility_bound_seconds: float,
        notified: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._metadata = metadata
        self._buckets = buckets
        self._group = group
        self._notified = notified
        self._visibility_bound_us = round(visibility_bound_seconds * 1_000_000)
        self._now = now
        self._indexed_through_us: int | None = None
        self._reason: str | None = "not determined yet"
        self.lag: dict[str, TopicLag] = {}

    def status(self) -> FreshnessStatus:
        if self._indexed_through_us is None:
            return FreshnessStatus(indexed_through=None, lag_ms=None, reason=self._reason)
        lag_us = max(0, self._now_us() - self._indexed_through_us)
        return FreshnessStatus(indexed_through=time_of_us(self._indexed_through_us), lag_ms=lag_us // 1000, reason=self._reason)

    async def run(self) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    async def refresh(self) -> None:
        # Before anything is asked: what is put while we ask is not yet spoken for.
        now_us = self._now_us()
        try:
            # The log first: what it hands over between the two questions is then seen waiting on the topic.
            handed_over_us = await self._handed_over(now_us)
            through_us = min(await self._worked_through(OBJECTS, self._group, now_us), *handed_over_us)
        except StoreUnavailable as error:
            self._reason = f"{error.store} is not available"
        except _NotKnown as unknown:
            self._reason = str(unknown)
        else:
            self._reason = None
            self._indexed_through_us = max(self._indexed_through_us or 0, min(through_us, now_us) - self._visibility_bound_us)
        if self._indexed_through_us is not None:
            INDEXED_THROUGH_LAG_SECONDS.set((now_us - self._indexed_through_us) / 1_000_000)

    async def _worked_through(self, topic: Topic, group: str, now_us: int) -> int:
        partitions = await self._broker.lag(topic, group)
        pending = sum(p.pending for p in partitions)
        self.lag = {**self.lag, topic.name: TopicLag(pending=pending, partitions=len(partitions))}
        if topic is OBJECTS:
            OBJECTS_LAG.set(pending)
        waiting = [partition for partition in partitions if partition.pending]
        times = await asyncio.gather(*(self._first_waiting(topic, partition) for partition in waiting))
        return min([now_us, *(time_ms * 1000 for time_ms in times if time_ms is not None)])

    async def _first_waiting(self, topic: Topic, lag: PartitionLag) -> int | None:
        return await self._broker.time_of(topic, lag.partition, max(lag.committed, lag.begin))

    async def _handed_over(self, now_us: int) -> list[int]:
        if self._notified:
            return [await self._worked_through(OBJECT_NOTIFICATIONS, RELAY_GROUP, now_us)]
        buckets = await self._buckets()
        cursors = [await self._metadata.cursor(log_cursor_name(bucket)) for bucket in buckets]
        missing = [bucket for bucket, cursor in zip(buckets, cursors, strict=True) if cursor is None]
        if missing:
            raise _NotKnown(f"the change log of {', '.join(missing)} has not been followed yet")
        return [cursor.position // 1000 for cursor in cursors if cursor is not None]

    def _now_us(self) -> int:
        return round(self._now() * 1_000_000)


class _NotKnown(Exception):
    """Nothing can be said yet; the message is for people."""
