"""Promise: a worker that was taken for dead and comes back does no harm, and one that is dead is replaced by the others.

The fault bites: the stopped worker had work in hand, the others were given its partitions, and its log says that it dropped
what it held. Numbered objects, a tenth overwritten and a tenth deleted while it was away.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed, until
from tests.failpoints import Gate, hold_after
from tests.pictures import jpeg

OBJECTS = 120
SESSION_SECONDS = 6.0


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


async def test_two_workers_one_evicted_and_one_killed(deployment: Deployment, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    gate.close()
    first, second = deployment.worker(), deployment.worker(hold_after(4, gate))
    await until(lambda: deployment.is_shared_by(2))  # so each of them gets some of what is sent from now on
    await deployment.send([await deployment.put(_key(number), jpeg(number, (160, 120))) for number in range(OBJECTS)])
    await gate.reached()
    second.process.send_signal(signal.SIGSTOP)
    for number in range(0, OBJECTS, 10):
        await deployment.send([await deployment.put(_key(number), jpeg(1000 + number, (160, 120)))])
        await deployment.send([await deployment.remove(_key(number + 5))])
    await deployment.settle()  # only possible when the group has given all partitions to the first
    second.process.send_signal(signal.SIGCONT)
    await until(lambda: second.says("partitions were taken away"))
    gate.open()
    await until(lambda: second.says("batch dropped"))
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
