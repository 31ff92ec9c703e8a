"""Promise: a worker killed after any step of a batch loses nothing, doubles nothing, and owes nobody an outcome.

The fault bites: the process is seen dead by SIGKILL. Then another worker takes over, and verify looks from outside.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from schemas.events import OutcomeEvent, OutcomeType
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.pictures import jpeg

PICTURE_SIZE = (120, 90)


def picture(seed: int) -> bytes:
    return jpeg(seed, PICTURE_SIZE)


@pytest.fixture
async def deployment(fresh_settings: FreshSettings, tmp_path: Path) -> AsyncIterator[Deployment]:
    settings = fresh_settings(ProcessorSettings, session_timeout_seconds=6.0, batch_size=16, decode_workers=1)
    async with deployed(settings, tmp_path) as made:
        yield made


async def indexed_before(deployment: Deployment) -> None:
    """Objects that the batch under test will overwrite, break and delete."""
    worker = deployment.worker()
    await deployment.send(
        [await deployment.put(key, picture(number)) for number, key in enumerate(("old.jpg", "bad.jpg", "gone.jpg"))]
    )
    await deployment.settle()
    assert await worker.stop() == 0


async def the_batch(deployment: Deployment) -> None:
    await deployment.send(
        [
            await deployment.put("new.jpg", picture(10)),
            await deployment.put("copy.jpg", picture(10)),
            await deployment.put("old.jpg", picture(11)),
            await deployment.put("bad.jpg", picture(12)[:200]),
            await deployment.remove("gone.jpg"),
        ]
    )
    await deployment.send_raw(b"not an event")


async def assert_all_told(deployment: Deployment) -> None:
    await deployment.verified()
    rows = await deployment.rows()
    assert {key: row.state for key, row in rows.items()} == {
        "new.jpg": RowState.INDEXED,
        "copy.jpg": RowState.INDEXED,
        "old.jpg": RowState.INDEXED,
        "bad.jpg": RowState.FAILED,
        "gone.jpg": RowState.DELETED,
    }
    assert all(row.is_published for row in rows.values())
    distinct: dict[str, OutcomeEvent] = {outcome.id: outcome for outcome in await deployment.outcomes()}
    told = Counter(
        (outcome.data.key, outcome.type) for outcome in distinct.values() if outcome.type is not OutcomeType.DUPLICATE
    )
    assert told == {
        ("old.jpg", OutcomeType.INDEXED): 1,
        ("bad.jpg", OutcomeType.INDEXED): 1,
        ("gone.jpg", OutcomeType.INDEXED): 1,
        ("new.jpg", OutcomeType.INDEXED): 1,
        ("copy.jpg", OutcomeType.INDEXED): 1,
        ("old.jpg", OutcomeType.UPDATED): 1,
        ("bad.jpg", OutcomeType.FAILED): 1,
        ("gone.jpg", OutcomeType.DELETED): 1,
    }
    letters = {
        (letter.headers["image-search-partition"], letter.headers["image-search-offset"])
        for letter in await deployment.dead_letters()
    }
    assert len(letters) == 2


@pytest.mark.parametrize("step", range(1, 12))
async def test_a_worker_killed_after_a_step(deployment: Deployment, step: int) -> None:
    await indexed_before(deployment)
    await the_batch(deployment)
    assert await deployment.worker(kill_after=step).wait_dead() == -signal.SIGKILL
    survivor = deployment.worker()
    await deployment.settle()
    assert await survivor.stop() == 0
    await assert_all_told(deployment)


@pytest.mark.parametrize("step", [8, 9])
async def test_one_of_two_workers_killed_after_a_step(deployment: Deployment, step: int) -> None:
    await indexed_before(deployment)
    survivor = deployment.worker()
    victim = deployment.worker(kill_after=step)
    # Work until the partitions of the victim have brought it something: it joins the group only after a rebalance.
    await the_batch(deployment)
    for number in range(200):
        if victim.process.poll() is not None:
            break
        await deployment.send([await deployment.put(f"more/{number}.jpg", picture(100 + number))])
        await deployment.settle()
    assert await victim.wait_dead() == -signal.SIGKILL
    await deployment.settle()
    assert await survivor.stop() == 0
    report = await deployment.verified()
    assert report.to_json()
    outcomes = {outcome.id: outcome for outcome in await deployment.outcomes()}
    told = Counter(outcome.data.key for outcome in outcomes.values() if outcome.type is OutcomeType.INDEXED)
    rows = await deployment.rows()
    assert all(row.is_published for row in rows.values())
    assert {key for key in rows if key.startswith("more/")} <= told.keys()
