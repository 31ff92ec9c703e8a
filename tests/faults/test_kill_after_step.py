"""Promise: a worker killed after any step of a batch loses nothing, doubles nothing, and owes nobody an outcome.

The fault bites: the process is seen dead by SIGKILL. Then another worker takes over, and verify looks from outside.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from infra.settings import ProcessorSettings
from schemas.events import OutcomeType
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.failpoints import kill_after
from tests.pictures import jpeg

PICTURE_SIZE = (120, 90)

STATES = {
    "new.jpg": RowState.INDEXED,
    "copy.jpg": RowState.INDEXED,
    "old.jpg": RowState.INDEXED,
    "bad.jpg": RowState.FAILED,
    "gone.jpg": RowState.DELETED,
}
TOLD = {
    ("old.jpg", OutcomeType.INDEXED): 1,
    ("bad.jpg", OutcomeType.INDEXED): 1,
    ("gone.jpg", OutcomeType.INDEXED): 1,
    ("new.jpg", OutcomeType.INDEXED): 1,
    ("copy.jpg", OutcomeType.INDEXED): 1,
    ("old.jpg", OutcomeType.UPDATED): 1,
    ("bad.jpg", OutcomeType.FAILED): 1,
    ("gone.jpg", OutcomeType.DELETED): 1,
}


def picture(seed: int) -> bytes:
    return jpeg(seed, PICTURE_SIZE)


@pytest.fixture(scope="module")
async def deployment(module_settings: FreshSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    settings = module_settings(
        ProcessorSettings, session_timeout_seconds=6.0, batch_size=64, decode_workers=1, kafka_partitions=4
    )
    async with deployed(settings, tmp_path_factory.mktemp("workers")) as made:
        yield made


async def indexed_before(deployment: Deployment, folder: str, seed: int) -> None:
    """Objects that the batch under test will overwrite, break and delete."""
    keys = [f"{folder}/{name}.jpg" for name in ("old", "bad", "gone")]
    with_worker = deployment.worker()
    await deployment.send([await deployment.put(key, picture(seed + number)) for number, key in enumerate(keys)])
    await deployment.settle()
    assert await with_worker.stop() == 0


async def send_the_batch(deployment: Deployment, folder: str, seed: int) -> None:
    await deployment.send(
        [
            await deployment.put(f"{folder}/new.jpg", picture(seed + 10)),
            await deployment.put(f"{folder}/copy.jpg", picture(seed + 10)),
            await deployment.put(f"{folder}/old.jpg", picture(seed + 11)),
            await deployment.put(f"{folder}/bad.jpg", picture(seed + 12)[:200]),
            await deployment.remove(f"{folder}/gone.jpg"),
        ]
    )
    await deployment.send_raw(f"not an event, {folder}".encode())


async def assert_all_told(deployment: Deployment, folder: str) -> None:
    await deployment.verified()
    rows = {
        key.removeprefix(f"{folder}/"): row for key, row in (await deployment.rows()).items() if key.startswith(f"{folder}/")
    }
    assert {key: rows[key].state for key in STATES} == STATES
    assert all(row.is_published for row in rows.values())
    distinct = {outcome.id: outcome for outcome in await deployment.outcomes() if outcome.data.key.startswith(f"{folder}/")}
    told = Counter(
        (outcome.data.key.removeprefix(f"{folder}/"), outcome.type)
        for outcome in distinct.values()
        if outcome.type is not OutcomeType.DUPLICATE
    )
    assert {what: number for what, number in told.items() if what[0] in STATES} == TOLD
    letters = {
        (letter.headers["image-search-partition"], letter.headers["image-search-offset"])
        for letter in await deployment.dead_letters()
        if folder in letter.value.decode()
    }
    assert len(letters) == 2


@pytest.mark.parametrize("step", range(1, 12))
async def test_a_worker_killed_after_a_step(deployment: Deployment, step: int) -> None:
    folder = f"one-{step:02}"
    await indexed_before(deployment, folder, 100 * step)
    await send_the_batch(deployment, folder, 100 * step)
    assert await deployment.worker(kill_after(step)).wait_dead() == -signal.SIGKILL
    survivor = deployment.worker()
    await deployment.settle()
    assert await survivor.stop() == 0
    await assert_all_told(deployment, folder)


@pytest.mark.parametrize("step", [8, 9])
async def test_one_of_two_workers_killed_after_a_step(deployment: Deployment, step: int) -> None:
    folder = f"two-{step:02}"
    await indexed_before(deployment, folder, 5000 + 100 * step)
    survivor, victim = deployment.worker(), deployment.worker(kill_after(step))
    # The victim has work only once a rebalance has given it partitions, so there is always something more to do.
    for number in range(300):
        if victim.process.poll() is not None:
            break
        await deployment.send([await deployment.put(f"{folder}/more-{number}.jpg", picture(10_000 + 1000 * step + number))])
        await deployment.settle()
    assert await victim.wait_dead() == -signal.SIGKILL
    await send_the_batch(deployment, folder, 5000 + 100 * step)
    await deployment.settle()
    assert await survivor.stop() == 0
    await assert_all_told(deployment, folder)
