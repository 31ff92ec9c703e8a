"""Promise: a wrong clock on one host decides nothing: what the bucket holds does (invariants 1 to 3).

One worker of two is ten minutes ahead; Debian's `faketime` lies to it about the time, which is seen in its log. A clock that is
further off than S3 allows for is a fault that is told as such, and takes nothing out of the index.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.local_stack import ports
from infra.settings import ProcessorSettings
from schemas.events import ReasonCode
from schemas.tables import RowState
from schemas.topics import HEADER_REASON
from tests.bridge import scan
from tests.conftest import FreshSettings, unavailable
from tests.deployment import Deployment, WorkerProcess, deployed, until
from tests.faults_long.wrong_clock_worker import PRELOAD
from tests.numbered import Numbered

pytestmark = pytest.mark.timeout(900)

OBJECTS = 100
AHEAD = timedelta(minutes=10)
TOO_FAR_AHEAD = timedelta(minutes=20)
"""S3 takes requests that are signed within a quarter of an hour."""
STARTED = "worker started"


class WrongClockWorker(WorkerProcess):
    program = "tests.faults_long.wrong_clock_worker"


@pytest.fixture
def library() -> Path:
    found = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if found is None:
        unavailable("a wrong clock takes the package faketime: make faketime as root, or apt install faketime")
    return found


async def test_one_worker_ahead(
    fresh_settings: FreshSettings, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=8, queue_events=16, kafka_partitions=4)
    async with deployed(settings, tmp_path) as deployment:
        ahead = await started_ahead(deployment, library, monkeypatch, AHEAD)
        right = deployment.worker()
        await until(lambda: right.says(STARTED))
        numbered = Numbered(deployment, OBJECTS)
        old_events = await numbered.put()
        await deployment.send(old_events)
        await deployment.send(await numbered.change())
        await deployment.send(old_events[::10])  # what was overwritten is told of again, last
        await deployment.settle()
        assert await right.stop() == 0

        more = Numbered(deployment, OBJECTS, folder="ahead-alone", first_seed=1000)
        await deployment.send(await more.put())
        await deployment.send(await more.change())
        await deployment.settle()
        assert await ahead.stop() == 0
        deployment.worker()
        again = Numbered(deployment, OBJECTS, folder="ahead-alone", first_seed=2000)
        await deployment.send(await again.put())  # over what the worker wrote whose clock is still to come
        await deployment.send(await again.change())
        await deployment.settle()
        await numbered.assert_as_the_bucket_says()
        await again.assert_as_the_bucket_says()


async def test_a_clock_that_the_store_refuses(
    fresh_settings: FreshSettings, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, read_give_up_seconds=2.0)
    async with deployed(settings, tmp_path) as deployment:
        numbered = Numbered(deployment, OBJECTS)
        right = deployment.worker()
        await deployment.send(await numbered.put())
        await deployment.settle()
        assert await right.stop() == 0

        ahead = await started_ahead(deployment, library, monkeypatch, TOO_FAR_AHEAD)
        changes = await numbered.change()
        await deployment.send(changes)
        await deployment.settle()
        assert await ahead.says("check access key, secret key, policy and clock")
        reasons = [letter.headers[HEADER_REASON] for letter in await deployment.dead_letters()]
        assert reasons == [ReasonCode.ACCESS_DENIED] * len(changes)
        assert {row.state for row in (await deployment.rows()).values()} == {RowState.INDEXED}
        assert await ahead.stop() == 0

        deployment.worker()
        await scan(deployment)
        await numbered.assert_as_the_bucket_says()


async def started_ahead(
    deployment: Deployment, library: Path, monkeypatch: pytest.MonkeyPatch, offset: timedelta
) -> WorkerProcess:
    """A worker whose clock is ahead; its log shows it. Only the time of day: time-outs and waits stay as they are."""
    settings = deployment.settings.model_copy(update={"processor_port": ports.find_free(1)[0]})
    with monkeypatch.context() as patched:
        patched.setenv(PRELOAD, str(library))
        patched.setenv("FAKETIME", f"+{offset.total_seconds():.0f}s")
        patched.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        worker = WrongClockWorker(settings, deployment.folder, name="wrong-clock")
    deployment.workers.append(worker)
    await until(lambda: worker.says(STARTED))
    lines = [json.loads(line) for line in worker.log.read_text().splitlines() if STARTED in line]
    assert datetime.fromisoformat(lines[-1]["timestamp"]) > datetime.now(UTC) + offset / 2
    return worker
