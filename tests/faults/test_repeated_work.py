"""Promise: a worker that is killed leaves little to be done again, and one that is asked to stop leaves nothing.

What was committed is never read again. What was acknowledged within the last commit interval is read again and dropped as
known. Only the batches that were in hand are embedded again.

The fault bites: the worker ends with two batches embedded and not written, more events waiting behind them. What each worker
did is counted by its own metrics, the rest by the group's offsets, after the first is dead.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from tests.conftest import FreshSettings
from tests.deployment import Deployment, WorkerProcess, deployed, until
from tests.failpoints import Gate, hold_after
from tests.numbered import Numbered

OLD, NEW = 30, 60
EVENTS = OLD + OLD // 5 + NEW  # of the old, a tenth is overwritten and a tenth deleted
PICTURES = OLD + OLD // 10 + NEW
BATCH = 8
BATCHES_IN_FLIGHT = 2
COMMIT_SECONDS = 3.0
"""Long enough that something is acknowledged and not yet committed when the worker ends."""


@pytest.fixture
async def deployment(fresh_settings: FreshSettings, tmp_path: Path) -> AsyncIterator[Deployment]:
    settings = fresh_settings(
        ProcessorSettings,
        kafka_partitions=1,
        decode_workers=1,
        batch_size=BATCH,
        batches_in_flight=BATCHES_IN_FLIGHT,
        queue_events=2 * BATCH,
        commit_interval_seconds=COMMIT_SECONDS,
    )
    async with deployed(settings, tmp_path) as made:
        yield made


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda end: end.name)
async def test_work_done_twice_when_a_worker_ends(deployment: Deployment, tmp_path: Path, end: signal.Signals) -> None:
    gate = Gate(tmp_path / "gate")
    old, new = Numbered(deployment, OLD, folder="old"), Numbered(deployment, NEW, folder="new", first_seed=1000)
    first = deployment.worker(hold_after(8, gate))
    await deployment.send(await old.put())
    await deployment.settle()  # commits come by themselves, every commit interval
    gate.close(BATCHES_IN_FLIGHT)
    await deployment.send([*await new.put(), *await old.change()])
    await gate.reached()
    gate.close(BATCHES_IN_FLIGHT)
    gate.open()
    await gate.reached()  # two batches were acknowledged a moment ago, and two more are as good as written
    embedded = await first.embedded()
    await _end(first, end, gate)

    committed = await deployment.committed()
    acknowledged = len(await deployment.outcomes())  # each event has one
    assert OLD <= committed <= acknowledged < EVENTS

    second = deployment.worker()
    await deployment.settle()
    assert await second.metric("image_search_events_read_total") == EVENTS - committed
    assert await second.metric("image_search_events_known_total") == acknowledged - committed
    embedded += await second.embedded()
    assert set(Counter(outcome.id for outcome in await deployment.outcomes()).values()) == {1}
    if end is signal.SIGTERM:
        assert committed == acknowledged
        assert embedded == PICTURES
    else:
        assert PICTURES < embedded <= PICTURES + BATCHES_IN_FLIGHT * BATCH
    assert await second.stop() == 0
    await old.assert_as_the_bucket_says()
    await new.assert_as_the_bucket_says()


async def _end(worker: WorkerProcess, by: signal.Signals, gate: Gate) -> None:
    worker.process.send_signal(by)
    if by is signal.SIGTERM:
        await until(lambda: worker.says("worker stops"))
        gate.open()
        assert await worker.wait_dead() == 0
    else:
        assert await worker.wait_dead() == -signal.SIGKILL
