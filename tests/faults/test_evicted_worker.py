"""Promise: a worker that was taken for dead and comes back does no harm, and one that is dead is replaced by the others.

The fault bites: the stopped worker had work in hand, the others were given its partitions, and its log says that it dropped
what it held. Numbered objects, a tenth overwritten and a tenth deleted while it was away.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.pictures import jpeg

OBJECTS = 120
SESSION_SECONDS = 6.0
PATIENCE_SECONDS = 60.0


@pytest.fixture
async def deployment(fresh_settings: FreshSettings, tmp_path: Path) -> AsyncIterator[Deployment]:
    settings = fresh_settings(
        ProcessorSettings,
        session_timeout_seconds=SESSION_SECONDS,
        batch_size=8,
        queue_events=16,
        decode_workers=1,
        kafka_partitions=4,
    )
    async with deployed(settings, tmp_path) as made:
        yield made


async def test_two_workers_one_evicted_and_one_killed(deployment: Deployment) -> None:
    first, second = deployment.worker(), deployment.worker()
    await _both_have_partitions(deployment)
    await deployment.send([await deployment.put(_key(number), jpeg(number, (160, 120))) for number in range(OBJECTS)])
    await _until(lambda: _indexed(deployment, 4))
    second.process.send_signal(signal.SIGSTOP)
    for number in range(0, OBJECTS, 10):
        await deployment.send([await deployment.put(_key(number), jpeg(1000 + number, (160, 120)))])
        await deployment.send([await deployment.remove(_key(number + 5))])
    await deployment.settle()  # only possible when the group has given all partitions to the first
    second.process.send_signal(signal.SIGCONT)
    await _until(lambda: _says(second.log, "batch dropped"))
    assert second.process.poll() is None, deployment.last_lines()
    await _as_the_bucket_says(deployment)

    first.kill()
    await deployment.send([await deployment.put(_key(number), jpeg(2000 + number, (160, 120))) for number in range(5)])
    await deployment.settle()
    await _as_the_bucket_says(deployment)
    assert await second.stop() == 0


def _key(number: int) -> str:
    return f"{number:03}.jpg"


async def _as_the_bucket_says(deployment: Deployment) -> None:
    await deployment.verified()
    states = {key: row.state for key, row in (await deployment.rows()).items()}
    deleted = {_key(number) for number in range(5, OBJECTS, 10)}
    indexed = {_key(number) for number in range(OBJECTS)} - deleted
    assert states == dict.fromkeys(deleted, RowState.DELETED) | dict.fromkeys(indexed, RowState.INDEXED)


async def _both_have_partitions(deployment: Deployment) -> None:
    for worker in deployment.workers:
        await _until(partial(_says, worker.log, "worker started"))
    # The one that came last joins the group at the next heartbeat of the other, a third of a session later.
    await asyncio.sleep(SESSION_SECONDS / 2)


async def _indexed(deployment: Deployment, least: int) -> bool:
    return len(await deployment.rows()) >= least


async def _says(log: Path, words: str) -> bool:
    return words in await asyncio.to_thread(log.read_text)


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():
            await asyncio.sleep(0.05)
