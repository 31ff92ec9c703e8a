"""Promise: a worker that stands still keeps its partitions while it is alive, and one that is stuck for good is ended.

Heartbeats come from a thread of their own. The fault bites: the worker says when it stands still, nothing is acknowledged
meanwhile, and a blocked event loop answers nobody.
"""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]  # aiokafka ships no types

from infra.local_stack import ports
from infra.settings import ProcessorSettings
from schemas.topics import PROCESSOR_GROUP
from tests.conftest import FreshSettings
from tests.deployment import Deployment, WorkerProcess, deployed, until
from tests.faults_long.blocked_worker import BLOCKED, FREE, PART, SECONDS
from tests.pictures import jpeg

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
    fresh_settings: FreshSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=8, queue_events=16)
    async with deployed(settings, tmp_path) as deployment:
        worker = blocked_worker(deployment, monkeypatch, part, BLOCKED_SECONDS[part])
        await until(lambda: worker.says("worker started"))
        await deployment.send([await deployment.put(key(number), picture(number)) for number in range(OBJECTS)])
        await until(lambda: worker.says(BLOCKED))
        before = await members(deployment)
        assert len(before) == 1
        assert await answers(worker) is (part == "model")
        while not await worker.says(FREE):
            assert await members(deployment) == before
            assert await deployment.lag() == OBJECTS
            await asyncio.sleep(2)
        await deployment.settle()
        assert await members(deployment) == before
        assert not await worker.says("partitions were taken away")
        await deployment.verified()
        assert len(await deployment.rows()) == OBJECTS
        assert await worker.stop() == 0


async def test_a_worker_that_is_stuck_ends_and_another_does_its_work(
    fresh_settings: FreshSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, watchdog_seconds=WATCHDOG_SECONDS)
    async with deployed(settings, tmp_path) as deployment:
        worker = blocked_worker(deployment, monkeypatch, "model", STUCK_SECONDS)
        await deployment.send([await deployment.put(key(number), picture(number)) for number in range(OBJECTS)])
        await until(lambda: worker.says(BLOCKED))
        assert await worker.wait_dead() == 1
        assert await worker.says("no progress for 20 s although there is work")
        assert await deployment.lag() == OBJECTS
        deployment.worker()
        await deployment.settle()
        await deployment.verified()
        assert len(await deployment.rows()) == OBJECTS


def blocked_worker(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, part: str, seconds: float) -> BlockedWorker:
    monkeypatch.setenv(PART, part)
    monkeypatch.setenv(SECONDS, str(seconds))
    settings = deployment.settings.model_copy(update={"processor_port": ports.find_free(1)[0]})
    worker = BlockedWorker(settings, deployment.folder, name="blocked")
    deployment.workers.append(worker)
    return worker


def key(number: int) -> str:
    return f"{number:03}.jpg"


def picture(seed: int) -> bytes:
    return jpeg(seed, (120, 90))


async def answers(worker: WorkerProcess) -> bool:
    def ask() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{worker.port}/metrics", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return await asyncio.to_thread(ask)


async def members(deployment: Deployment) -> set[str]:
    """Who is in the group. A worker that is thrown out and comes back has another name."""
    admin = AIOKafkaAdminClient(bootstrap_servers=list(deployment.settings.kafka_bootstrap))
    await admin.start()
    try:
        [answer] = await admin.describe_consumer_groups([deployment.settings.kafka_topic_prefix + PROCESSOR_GROUP])
    finally:
        await admin.close()
    [group] = answer.to_object()["groups"]
    assert group["state"] == "Stable"
    return {member["member_id"] for member in group["members"]}
