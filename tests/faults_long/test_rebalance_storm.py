"""Promise: workers may come and go all the time: work goes on, and nothing is lost, left over or worked on for ever.

Every ten seconds a worker is started or one is ended, by SIGKILL and SIGTERM in turn, while numbered pictures come, a tenth of
them is overwritten and a tenth deleted.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from schemas.tables import RowState
from schemas.topics import OBJECTS, PROCESSOR_GROUP
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.pictures import jpeg

pytestmark = pytest.mark.timeout(1200)

STORM_SECONDS = 300.0
PERIOD_SECONDS = 10.0
LONGEST_STANDSTILL_SECONDS = 120.0
"""A worker that was killed is missed after its session of 10 s, and a new one takes some seconds to load its model."""
PICTURES_A_SECOND = 8


class Traffic:
    """Puts, overwrites and deletes until it is told to stop, and looks each second whether work goes on."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.expected: dict[str, RowState] = {}
        self.longest_standstill = 0.0
        self._over = False

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._put())
            tasks.create_task(self._watch())
            yield
            self._over = True

    async def _put(self) -> None:
        for number in itertools.count():
            if self._over:
                return
            key = f"{number:06}.jpg"
            events = [await self._deployment.put(key, jpeg(number, (120, 90)))]
            self.expected[key] = RowState.INDEXED
            if number % 10 == 3:
                events.append(await self._deployment.put(key, jpeg(1_000_000 + number, (120, 90))))
            if number % 10 == 7:
                events.append(await self._deployment.remove(key))
                self.expected[key] = RowState.DELETED
            await self._deployment.send(events)
            await asyncio.sleep(1 / PICTURES_A_SECOND)

    async def _watch(self) -> None:
        committed, since = -1, time.monotonic()
        while not self._over:
            lags = await self._deployment.broker.lag(OBJECTS, PROCESSOR_GROUP)
            now_committed = sum(lag.committed for lag in lags)
            if now_committed != committed or not any(lag.pending for lag in lags):
                committed, since = now_committed, time.monotonic()
            self.longest_standstill = max(self.longest_standstill, time.monotonic() - since)
            await asyncio.sleep(1)


async def test_workers_that_come_and_go_all_the_time(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=8, queue_events=16, kafka_partitions=4)
    async with deployed(settings, tmp_path) as deployment:
        deployment.worker()
        deployment.worker()
        traffic = Traffic(deployment)
        async with traffic.flowing():
            ended = await _storm(deployment)
        assert ended >= STORM_SECONDS / PERIOD_SECONDS / 2 - 1
        await deployment.settle()
        await deployment.verified()
        counts = await deployment.metadata.counts(bucket=deployment.bucket)
        assert {state: number for state, number in counts.items() if number} == Counter(traffic.expected.values())
        print(f"{len(traffic.expected)} objects, {ended} workers ended, nothing went on for {traffic.longest_standstill:.0f} s")
        assert traffic.longest_standstill < LONGEST_STANDSTILL_SECONDS


async def _storm(deployment: Deployment) -> int:
    """Returns how many workers were ended, the oldest first."""
    ends = time.monotonic() + STORM_SECONDS
    ended = 0
    while time.monotonic() < ends:
        deployment.worker()
        await asyncio.sleep(PERIOD_SECONDS)
        oldest = deployment.workers[ended]
        assert oldest.process.poll() is None, deployment.last_lines()
        if ended % 2 == 0:
            oldest.kill()
        else:
            assert await oldest.stop() == 0
        ended += 1
        await asyncio.sleep(PERIOD_SECONDS)
    return ended
