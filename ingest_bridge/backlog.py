"""How much a scan may write: today's picture waits behind what it wrote, and that shall be about a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from infra.kafka.interface import Broker
from schemas.topics import OBJECTS, PROCESSOR_GROUP

POLL_SECONDS = 0.2
RATE_WINDOW_SECONDS = 5.0


class Backlog:
    """Bounds the outstanding work of the consumer to `max(floor_events, rate * (seconds + commit_interval_seconds))`.

    The rate is measured from what the consumer commits. Work that is done but not yet committed counts as outstanding,
    which is why the time between commits is added: without it the consumer would run dry before each commit.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        floor_events: int,
        seconds: float,
        commit_interval_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._floor_events = floor_events
        self._seconds = seconds + commit_interval_seconds
        self._now = now
        self._committed: deque[tuple[float, int]] = deque()

    async def room(self) -> int:
        """How many events may be written now; 0 or less: none. Ask again after POLL_SECONDS. Raises StoreUnavailable."""
        partitions = await self._broker.lag(OBJECTS, PROCESSOR_GROUP)
        now = self._now()
        self._committed.append((now, sum(max(one.committed, one.begin) for one in partitions)))
        while self._committed[0][0] < now - RATE_WINDOW_SECONDS:
            self._committed.popleft()
        outstanding = sum(one.pending for one in partitions)
        return max(self._floor_events, int(self._rate() * self._seconds)) - outstanding

    def _rate(self) -> float:
        """Events a second that were committed lately."""
        (first_time, first), (last_time, last) = self._committed[0], self._committed[-1]
        return max(0, last - first) / (last_time - first_time) if last_time > first_time else 0.0
