"""Promise: a worker that stands still keeps its partitions while it is alive, and one that is stuck for good is ended.

Heartbeats come from a thread of their own. The fault bites: the worker says when it stands still, nothing is acknowledged
meanwhile, and a blocked event loop answers nobody.
"""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest

from infra.local_stack import ports
from infra.settings import ProcessorSettings
from tests.conftest import FreshSettings
from tests.deployment import Deployment, WorkerProcess, deployed, until
from tests.faults_long.blocked_worker import BLOCKED, FREE
from tests.numbered import Numbered

pytestmark = pytest.mark.timeout(900)

OBJECTS = 60
BLOCKED_SECONDS = {"model": 120.0, "loop": 90.0}
"""Each many times the session's time-out."""
WATCHDOG_SECONDS = 20.0
STUCK_SECONDS = 3600.0


class BlockedWorker(WorkerProcess):
    program = "tests.faults_long.blocked_worker"


@pytest.mark.parametrize("part", ["model", "loop"])
async def test_a_worker_that_stands_still_keeps_its_partitions(
    fresh_settings: FreshSettings, tmp_path: Path, part: str
) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=8, queue_events=16)
    async with deployed(settings, tmp_path) as deployment:
        worker = blocked_worker(deployment, part, BLOCKED_SECONDS[part])
        await until(lambda: worker.says("worker started"))
        numbered = Numbered(deployment, OBJECTS)
        await deployment.send(await numbered.put())
        await until(lambda: worker.says(BLOCKED))
        before = await deployment.members()
        assert len(before) == 1
        assert await answers(worker) is (part == "model")
        while not await worker.says(FREE):
            assert await deployment.members() == before
            assert await deployment.lag() == OBJECTS
            await asyncio.sleep(2)
        await deployment.settle()
        assert await deployment.members() == before
        assert not await worker.says("partitions were taken away")
        await deployment.send(await numbered.change())
        await deployment.settle()
        await numbered.assert_as_the_bucket_says()
        assert await worker.stop() == 0


async def test_a_worker_that_is_stuck_ends_and_another_does_its_work(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, watchdog_seconds=WATCHDOG_SECONDS)
    async with deployed(settings, tmp_path) as deployment:
        worker = blocked_worker(deployment, "model", STUCK_SECONDS)
        numbered = Numbered(deployment, OBJECTS)
        await deployment.send(await numbered.put())
        await until(lambda: worker.says(BLOCKED))
        assert await worker.wait_dead() == 1
        assert await worker.says("no progress for 20 s although there is work")
        assert await deployment.lag() == OBJECTS
        deployment.worker()
        await deployment.settle()
        await deployment.send(await numbered.change())
        await deployment.settle()
        await numbered.assert_as_the_bucket_says()


def blocked_worker(deployment: Deployment, part: str, seconds: float) -> BlockedWorker:
    settings = deployment.settings.model_copy(update={"processor_port": ports.find_free(1)[0]})
    worker = BlockedWorker(settings, deployment.folder, name="blocked", failpoint=(part, str(seconds)))
    deployment.workers.append(worker)
    return worker


async def answers(worker: WorkerProcess) -> bool:
    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/metrics", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return await asyncio.to_thread(ask)
