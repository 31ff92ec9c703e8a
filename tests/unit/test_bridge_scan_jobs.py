"""Scans as jobs: when they are asked for, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import pytest

from infra.errors import StoreRefused, StoreUnavailable
from infra.jobs import LEASE_SECONDS
from infra.metadata_store.interface import Job
from infra.metrics import SCANS
from infra.object_store.memory import Operation
from ingest_bridge.scan import Scan
from ingest_bridge.scan_jobs import SCAN_JOB, ScanSchedule, ScanWorker
from ingest_bridge.scan_state import ScanPhase, ScanProgress
from schemas.events import ReasonCode
from schemas.jobs import ScanArguments
from schemas.tables import JobState
from tests.unit.scan_world import BUCKET, SECOND_US, ScanWorld


class JobWorld(ScanWorld):
    """Workers named by their owner; `begun` are the scans they took up."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[Scan] = []
        self.failed_buckets: list[str] = []
        self.before_scan: Callable[[Scan], None] = lambda scan: None

    async def worker(
        self, owner: str = "one", *, buckets: Sequence[str] = (BUCKET,), report_seconds: float = 0.001
    ) -> ScanWorker:
        producer = await self.broker.producer()

        def make(scan_id: str, arguments: ScanArguments, progress: ScanProgress) -> Scan:
            scan = self.scan_with(scan_id, arguments, progress, producer, give_up_seconds=0.0)
            self.begun.append(scan)
            self.before_scan(scan)
            return scan

        return ScanWorker(
            self.metadata,
            make,
            buckets=buckets,
            owner=owner,
            on_failed=self.failed_buckets.append,
            report_seconds=report_seconds,
        )

    async def ask(self, **arguments: object) -> str:
        return (await self.metadata.add_job(SCAN_JOB, {"bucket": BUCKET, **arguments})).job_id

    async def job(self, job_id: str) -> Job:
        job = await self.metadata.job(job_id)
        assert job is not None
        return job

    def hold_at_listing(self) -> asyncio.Event:
        """The store does not answer a listing until the event is set."""
        go_on = asyncio.Event()

        async def hold(operation: Operation, bucket: str, key: str | None) -> None:
            if operation is Operation.LIST:
                await go_on.wait()

        self.objects.before_call = hold
        return go_on


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> JobWorld:
    monkeypatch.setattr("infra.retry.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("infra.retry.LONGEST_WAIT_SECONDS", 0.0)
    return JobWorld()


# -- the worker ------------------------------------------------------------------------------------------------------------
async def test_a_scan_is_worked_on_to_its_end(world: JobWorld) -> None:
    await world.put("a")
    job_id = await world.ask(prefix="", allow_removal=False)
    assert await (await world.worker()).run_next()
    job = await world.job(job_id)
    assert job.state is JobState.DONE
    assert (job.progress["phase"], job.progress["written"], job.progress["listed"]) == ("done", 1, 1)
    assert world.in_short() == ["scan a"]


async def test_without_a_job_there_is_nothing_to_do(world: JobWorld) -> None:
    assert not await (await world.worker()).run_next()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bucket": 5}, "bucket: "),
        ({"unknown": True}, "unknown: Extra inputs"),
        ({"bucket": "elsewhere"}, "not followed"),
    ],
    ids=str,
)
async def test_what_cannot_be_scanned_fails_with_a_reason(world: JobWorld, arguments: dict[str, object], words: str) -> None:
    job_id = await world.ask(**arguments)
    assert await (await world.worker()).run_next()
    job = await world.job(job_id)
    assert job.state is JobState.FAILED
    assert job.message is not None and words in job.message
    assert world.begun == []


async def test_a_scan_of_a_bucket_that_was_just_added_waits_for_a_bridge_that_follows_it(world: JobWorld) -> None:
    await world.metadata.add_bucket("elsewhere")
    job_id = await world.ask(bucket="elsewhere")
    assert not await (await world.worker()).run_next()
    job = await world.job(job_id)
    assert (job.state, job.message, job.lease_until_us) == (JobState.QUEUED, None, 0)
    assert world.begun == []
    await world.objects.ensure_bucket("elsewhere")
    assert await (await world.worker("two", buckets=[BUCKET, "elsewhere"])).run_next()
    assert (await world.job(job_id)).state is JobState.DONE


async def test_a_mass_removal_leaves_the_job_stopped(world: JobWorld) -> None:
    for number in range(101):
        await world.index(str(number))
        await world.delete(str(number))
    stopped = SCANS.labels(JobState.STOPPED)
    counted = stopped._value.get()
    job_id = await world.ask()
    await (await world.worker()).run_next()
    job = await world.job(job_id)
    assert job.state is JobState.STOPPED
    assert stopped._value.get() == counted + 1
    assert job.message is not None and "--allow-removal" in job.message and "101 of 101" in job.message
    assert world.events() == []
    assert world.failed_buckets == []  # it would stop again


async def test_a_bucket_that_is_missing_fails_the_scan(world: JobWorld) -> None:
    await world.index("a")

    async def missing(operation: Operation, bucket: str, key: str | None) -> None:
        raise StoreRefused(ReasonCode.BUCKET_NOT_FOUND, "the bucket 'images' is missing")

    world.objects.before_call = missing
    job_id = await world.ask()
    await (await world.worker()).run_next()
    job = await world.job(job_id)
    assert (job.state, job.message) == (JobState.FAILED, "the bucket 'images' is missing. Nothing was removed")
    assert world.events() == []
    assert world.failed_buckets == [BUCKET]


async def test_an_error_of_our_own_is_not_hidden(world: JobWorld) -> None:
    async def bug(operation: Operation, bucket: str, key: str | None) -> None:
        raise KeyError("ours")

    world.objects.before_call = bug
    job_id = await world.ask()
    with pytest.raises(KeyError):
        await (await world.worker()).run_next()
    job = await world.job(job_id)
    assert (job.state, job.message) == (JobState.FAILED, "internal error: the log of the service has it")


async def test_progress_and_lease_are_kept_up_while_it_runs(world: JobWorld) -> None:
    go_on = world.hold_at_listing()
    job_id = await world.ask()
    running = asyncio.create_task((await world.worker()).run_next())
    async with asyncio.timeout(5):
        while (await world.job(job_id)).progress.get("phase") != ScanPhase.LISTING:
            await asyncio.sleep(0.001)
    world.now_us += 20 * SECOND_US
    async with asyncio.timeout(5):
        while (await world.job(job_id)).lease_until_us < world.now_us + (LEASE_SECONDS - 1) * SECOND_US:
            await asyncio.sleep(0.001)
    go_on.set()
    await running
    assert (await world.job(job_id)).state is JobState.DONE


async def test_one_that_lost_its_lease_stops_and_changes_nothing(world: JobWorld) -> None:
    world.hold_at_listing()
    job_id = await world.ask()
    running = asyncio.create_task((await world.worker("slow", report_seconds=0.05)).run_next())
    async with asyncio.timeout(5):
        while not world.begun:
            await asyncio.sleep(0)
    world.now_us += 60 * SECOND_US
    taken = await world.metadata.claim_job([SCAN_JOB], owner="other", lease_seconds=30)
    assert taken is not None
    assert await running
    job = await world.job(job_id)
    assert (job.state, job.owner) == (JobState.RUNNING, "other")


async def test_a_bridge_that_stops_hands_its_scan_back_and_the_next_goes_on(world: JobWorld) -> None:
    for number in range(9):
        await world.put(str(number))
    pages = 0
    stuck = asyncio.Event()

    async def stop_at_the_second_page(operation: Operation, bucket: str, key: str | None) -> None:
        nonlocal pages
        pages += world.begun[0].progress.phase is ScanPhase.COMPARING
        if pages == 2:
            stuck.set()
            await asyncio.Event().wait()

    world.objects.before_call = stop_at_the_second_page
    job_id = await world.ask()
    running = asyncio.create_task((await world.worker()).run_next())
    async with asyncio.timeout(5):
        await stuck.wait()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    job = await world.job(job_id)
    assert (job.state, job.progress["last_key"], job.progress["compared"]) == (JobState.QUEUED, "2", 3)

    async def quiet(operation: Operation, bucket: str, key: str | None) -> None:
        return None

    world.objects.before_call = quiet
    await (await world.worker("two")).run_next()
    job = await world.job(job_id)
    assert (job.state, job.progress["compared"]) == (JobState.DONE, 9)
    assert world.in_short() == [f"scan {number}" for number in range(9)]


async def test_a_database_that_blinks_does_not_end_a_scan(world: JobWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = world.hold_at_listing()
    job_id = await world.ask()
    real = world.metadata.update_job
    failures = 0

    async def blink(*arguments: object, **named: object) -> bool:
        nonlocal failures
        if failures < 3:
            failures += 1
            if failures == 3:
                go_on.set()
            raise StoreUnavailable("database", "away")
        return await real(*arguments, **named)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(world.metadata, "update_job", blink)
    await (await world.worker()).run_next()
    assert failures == 3
    assert (await world.job(job_id)).state is JobState.DONE


# -- the schedule ----------------------------------------------------------------------------------------------------------
class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def schedule(world: JobWorld, clock: Clock) -> ScanSchedule:
    return ScanSchedule(world.metadata, ["images", "others"], interval_seconds=900, now=clock)


async def queued(world: JobWorld) -> list[str]:
    return sorted(str(job.arguments["bucket"]) for job in await world.metadata.unfinished_jobs(SCAN_JOB))


async def finish_all(world: JobWorld) -> None:
    while job := await world.metadata.claim_job([SCAN_JOB], owner="x", lease_seconds=30):
        await world.metadata.update_job(job.job_id, owner="x", state=JobState.DONE, progress={})


async def test_each_bucket_is_scanned_at_the_start_and_at_every_interval(
    world: JobWorld, schedule: ScanSchedule, clock: Clock
) -> None:
    await schedule.tick()
    assert await queued(world) == ["images", "others"]
    await finish_all(world)
    clock.seconds += 899
    await schedule.tick()
    assert await queued(world) == []
    clock.seconds += 1
    await schedule.tick()
    assert await queued(world) == ["images", "others"]


async def test_one_that_is_still_to_begin_is_enough(world: JobWorld, schedule: ScanSchedule) -> None:
    await world.ask()
    await schedule.tick()
    schedule.want_all()
    await schedule.tick()
    assert await queued(world) == ["images", "others"]


async def test_a_scan_of_a_part_is_not_enough(world: JobWorld, schedule: ScanSchedule) -> None:
    await world.ask(prefix="a/")
    await schedule.tick()
    assert await queued(world) == ["images", "images", "others"]


@pytest.mark.parametrize("how_far", [{}, {"last_key": "m"}])
async def test_one_that_is_under_way_is_not_enough_and_is_waited_for(
    world: JobWorld, schedule: ScanSchedule, how_far: dict[str, object]
) -> None:
    """It may have passed by what is missing; so may one that was handed back and is queued again."""
    job_id = await world.ask()
    await world.metadata.claim_job([SCAN_JOB], owner="x", lease_seconds=30)
    state = JobState.QUEUED if how_far else JobState.RUNNING
    await world.metadata.update_job(job_id, owner="x", state=state, progress=how_far, lease_seconds=30)
    world.now_us += SECOND_US  # so that this job is the older one, and is claimed first
    await schedule.tick()
    assert await queued(world) == ["images", "others"]
    await world.metadata.claim_job([SCAN_JOB], owner="x", lease_seconds=30)
    await world.metadata.update_job(job_id, owner="x", state=JobState.DONE, progress={})
    await schedule.tick()
    [job] = [job for job in await world.metadata.unfinished_jobs(SCAN_JOB) if job.arguments["bucket"] == "images"]
    assert job.job_id != job_id
    assert ScanArguments.model_validate(job.arguments) == ScanArguments(bucket="images")


async def test_what_is_wanted_later_comes_later(world: JobWorld, schedule: ScanSchedule, clock: Clock) -> None:
    await schedule.tick()
    await finish_all(world)
    schedule.want("images", after_seconds=60)
    await schedule.tick()
    assert await queued(world) == []
    clock.seconds += 60
    await schedule.tick()
    assert await queued(world) == ["images"]


async def test_a_database_that_is_away_does_not_end_the_schedule(
    world: JobWorld, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, slept = world.metadata.unfinished_jobs, 0

    async def away(kind: str) -> list[Job]:
        raise StoreUnavailable("database", "away")

    async def sleep(seconds: float) -> None:
        nonlocal slept
        slept += 1
        if slept == 3:
            monkeypatch.setattr(world.metadata, "unfinished_jobs", real)
        if slept == 5:
            await asyncio.Event().wait()

    monkeypatch.setattr(world.metadata, "unfinished_jobs", away)
    schedule = ScanSchedule(world.metadata, ["images"], interval_seconds=900, now=clock, sleep=sleep)
    running = asyncio.create_task(schedule.run())
    async with asyncio.timeout(5):
        while slept < 5:
            await asyncio.sleep(0)
    running.cancel()
    assert await queued(world) == ["images"]
