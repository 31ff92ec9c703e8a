"""Promise: a store that is down stops progress, loses nothing, and needs no hand when it is back (invariant 6).

Each test proves that the fault bit (the server is away, and nothing was acknowledged meanwhile) and ends with verify.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from infra.settings import ProcessorSettings
from schemas.events import OutcomeType
from schemas.tables import RowState
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed
from tests.pictures import jpeg

PICTURES = 60
AWAY_SECONDS = 4.0


def picture(seed: int) -> bytes:
    return jpeg(seed, (120, 90))


@pytest.fixture(scope="module")
async def deployment(module_settings: FreshSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    settings = module_settings(
        ProcessorSettings, decode_workers=1, batch_size=16, milvus_timeout_seconds=3.0, read_give_up_seconds=2.0
    )
    async with deployed(settings, tmp_path_factory.mktemp("worker")) as made:
        made.worker()
        await made.send([await made.put("first.jpg", picture(1))])
        await made.settle()
        yield made
        assert await made.workers[-1].stop() == 0


async def put_many(deployment: Deployment, folder: str, seed: int) -> None:
    await deployment.send(
        [await deployment.put(f"{folder}/{number:03}.jpg", picture(seed + number)) for number in range(PICTURES)]
    )


async def assert_all_indexed(deployment: Deployment, folder: str) -> None:
    rows = {key: row for key, row in (await deployment.rows()).items() if key.startswith(f"{folder}/")}
    assert len(rows) == PICTURES
    assert {row.state for row in rows.values()} == {RowState.INDEXED}
    told = {outcome.data.key for outcome in await deployment.outcomes() if outcome.type is OutcomeType.INDEXED}
    assert rows.keys() <= told
    await deployment.verified()


async def test_vectors_away(deployment: Deployment, servers: Servers) -> None:
    async with servers.stack.paused("milvus"):
        await put_many(deployment, "vectors", 1000)
        await asyncio.sleep(AWAY_SECONDS)
        assert await deployment.lag() == PICTURES  # nothing was acknowledged
    await servers.stack.wait_ready("milvus")
    await deployment.settle()
    assert deployment.workers[0].process.poll() is None
    await assert_all_indexed(deployment, "vectors")


async def test_objects_away(deployment: Deployment, servers: Servers) -> None:
    events = [await deployment.put(f"objects/{number:03}.jpg", picture(2000 + number)) for number in range(PICTURES)]
    async with servers.stack.paused("seaweedfs"):
        await deployment.send(events)
        await asyncio.sleep(AWAY_SECONDS)
        assert await deployment.lag() == PICTURES  # longer than read_give_up_seconds: a store that is down is waited for
    await servers.stack.wait_ready("seaweedfs")
    await deployment.settle()
    await assert_all_indexed(deployment, "objects")


async def test_broker_killed_three_times(deployment: Deployment, servers: Servers) -> None:
    events = [await deployment.put(f"broker/{number:03}.jpg", picture(3000 + number)) for number in range(PICTURES)]
    for part in range(3):
        await deployment.send(events[part::4])
        before = servers.stack.running("kafka").pid
        servers.stack.kill("kafka")
        await servers.stack.wait_ready("kafka")
        assert servers.stack.running("kafka").pid != before
    await deployment.send(events[3::4])
    await deployment.settle()
    assert deployment.workers[-1].process.poll() is None
    await assert_all_indexed(deployment, "broker")


async def test_vectors_killed_in_the_middle(deployment: Deployment, servers: Servers) -> None:
    sending = asyncio.create_task(put_many(deployment, "middle", 4000))
    await asyncio.sleep(0.3)
    servers.stack.kill("milvus")
    await sending
    await servers.stack.wait_ready("milvus")
    await deployment.settle()
    await assert_all_indexed(deployment, "middle")


async def test_a_worker_that_is_asked_to_stop_finishes_and_commits(deployment: Deployment) -> None:
    """SIGTERM in the middle: what was acknowledged is committed, nothing is done twice."""
    await put_many(deployment, "stop", 5000)
    assert await deployment.workers[-1].stop() == 0
    deployment.worker()
    await deployment.settle()
    await assert_all_indexed(deployment, "stop")
    told = [outcome.id for outcome in await deployment.outcomes() if outcome.data.key.startswith("stop/")]
    assert len(told) == len(set(told)) == PICTURES
