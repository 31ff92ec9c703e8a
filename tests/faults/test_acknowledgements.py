"""Promise: an event is committed only when it and all before it are done with, whatever our own code or Faust does.

Faust commits past a gap of a single unacknowledged event (faust#606) and acknowledges what raised an error. On a real broker,
with Faust's own consumer: the committed offset is read from the broker while one event is unfinished and those behind it are.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from schemas.events import ObjectEvent, OutcomeType
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed, until
from tests.failpoints import Gate, fail_at, hold_at
from tests.numbered import Numbered

COMMIT_SECONDS = 0.5
BATCH = 4
FAILURES = 3
BEHIND = 3
"""Events that are done with behind the one that is not."""


@pytest.fixture
async def deployment(fresh_settings: FreshSettings, tmp_path: Path) -> AsyncIterator[Deployment]:
    settings = fresh_settings(
        ProcessorSettings, kafka_partitions=1, decode_workers=1, commit_interval_seconds=COMMIT_SECONDS, batch_size=BATCH
    )
    async with deployed(settings, tmp_path) as made:
        yield made


async def test_an_error_of_ours_at_one_object(deployment: Deployment, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    gate.close()
    old, new = Numbered(deployment, 20, folder="old"), Numbered(deployment, 20, folder="new", first_seed=1000)
    sent = await old.put()
    plain = deployment.worker()
    await deployment.send(sent)
    await deployment.settle()
    assert await plain.stop() == 0

    sent += [*await old.change(), *await new.put()]
    unlucky = len(sent) - 12
    worker = deployment.worker(fail_at(sent[unlucky].data.key, gate))
    await deployment.send(sent[20:])
    for failure in range(FAILURES):
        await gate.reached()
        await until(lambda: _indexed_behind(deployment, sent[unlucky + 1 :]))
        await _commits_come_and_go(deployment)
        assert unlucky - BATCH < await deployment.committed() <= unlucky
        if failure + 1 < FAILURES:
            gate.close()
        gate.open()
    await deployment.settle()
    assert await worker.says("batch failed")
    assert await worker.says("object failed", times=FAILURES - 1)  # as one of a batch, then twice alone
    told = Counter((outcome.data.key, outcome.type) for outcome in await deployment.outcomes())
    assert told[sent[unlucky].data.key, OutcomeType.INDEXED] == 1
    assert set(told.values()) == {1}
    assert await deployment.dead_letters() == []
    assert await worker.stop() == 0
    await old.assert_as_the_bucket_says()
    await new.assert_as_the_bucket_says()


@pytest.mark.parametrize(("before", "end"), [(0, signal.SIGKILL), (10, signal.SIGTERM)], ids=["first", "later"])
async def test_a_restart_with_one_event_unacknowledged_before_others(
    deployment: Deployment, tmp_path: Path, before: int, end: signal.Signals
) -> None:
    gate = Gate(tmp_path / "gate")
    gate.close()
    objects = Numbered(deployment, 20)
    sent = await objects.put()
    worker = deployment.worker(hold_at(objects.keys[before], gate), batch_size=1, batches_in_flight=1 + BEHIND)
    await deployment.send(sent[:before])
    await deployment.settle()
    await deployment.send(sent[before:])
    await gate.reached()
    await until(lambda: _done(deployment, objects.keys[before + 1 : before + 1 + BEHIND]))
    assert await deployment.row(objects.keys[before]) is None
    await _commits_come_and_go(deployment)
    assert await deployment.committed() == before
    worker.process.send_signal(end)
    assert await worker.wait_dead() == (-signal.SIGKILL if end is signal.SIGKILL else 0)
    assert await deployment.committed() == before

    survivor = deployment.worker()
    await deployment.settle()
    await deployment.send(await objects.change())
    await deployment.settle()
    assert await survivor.stop() == 0
    await objects.assert_as_the_bucket_says()


async def _indexed_behind(deployment: Deployment, events: Sequence[ObjectEvent]) -> bool:
    return not (await deployment.rows()).keys().isdisjoint(event.data.key for event in events)


async def _done(deployment: Deployment, keys: Sequence[str]) -> bool:
    """Up to the acknowledgement, which waits for the event in front."""
    rows = await deployment.rows()
    return all(key in rows and rows[key].is_published for key in keys)


async def _commits_come_and_go(deployment: Deployment) -> None:
    """Time for several commits: what would be committed wrongly is by then."""
    await asyncio.sleep(4 * COMMIT_SECONDS)
