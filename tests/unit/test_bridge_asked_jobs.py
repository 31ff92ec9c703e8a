"""Failed objects tried again, and verifications, as jobs of the bridge."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from infra import jobs
from infra.metadata_store.interface import Job
from infra.settings import BridgeSettings
from ingest_bridge.asked_jobs import MOST_ASKED_ATTEMPTS, AskedJobs
from ingest_bridge.backlog import Backlog
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_state import ScanProgress
from schemas.events import Cause, ReasonCode
from schemas.jobs import JobPlace, RetryArguments, VerifyArguments
from schemas.tables import JobKind, JobState, RowState
from tests.unit.scan_world import BUCKET, ScanWorld, ref

ALL = (JobPlace(bucket=BUCKET),)


class AskedWorld(ScanWorld):
    async def fail(self, key: str, reason: ReasonCode = ReasonCode.CORRUPT_IMAGE, attempt: int = 1) -> None:
        await self.settle(await self.put(key), state=RowState.FAILED, reason=reason, attempt=attempt, content_hash=None)

    async def worker(self) -> AskedJobs:
        producer = await self.broker.producer()

        def make_events(job_id: str, progress: ScanProgress) -> ScanEvents:
            backlog = Backlog(self.broker, floor_events=64, seconds=1.0, commit_interval_seconds=1.0, now=lambda: self.slept)
            return ScanEvents(
                job_id,
                progress,
                deployment="local",
                objects=self.objects,
                producer=producer,
                backlog=backlog,
                now_us=lambda: self.now_us,
                sleep=self.sleep,
            )

        return AskedJobs(
            BridgeSettings(buckets=(BUCKET,)),
            objects=self.objects,
            metadata=self.metadata,
            vectors=self.vectors,
            make_events=make_events,
            owner="one",
        )

    async def done(self, kind: JobKind, arguments: RetryArguments | VerifyArguments) -> Job:
        asked = await jobs.ask(self.metadata, kind, arguments)
        assert await (await self.worker()).run_next()
        job = await self.metadata.job(asked.job_id)
        assert job is not None
        return job

    def written(self) -> list[tuple[str, Cause, int, bool]]:
        return sorted((event.data.key, event.data.cause, event.data.attempt, event.data.removed) for event in self.events())


@pytest.fixture
async def world() -> AsyncIterator[AskedWorld]:
    yield AskedWorld()


async def test_failed_objects_are_tried_again_and_no_others(world: AskedWorld) -> None:
    await world.index("good")
    await world.fail("a/one")
    await world.fail("a/two", ReasonCode.DECODE_TIMEOUT, attempt=4)
    await world.fail("b/three")
    job = await world.done(JobKind.RETRY, RetryArguments(places=(JobPlace(bucket=BUCKET, prefix="a/"),)))
    assert (job.state, job.progress["written"]) == (JobState.DONE, 2)
    assert world.written() == [("a/one", Cause.RETRY, 2, False), ("a/two", Cause.RETRY, 5, False)]


async def test_only_those_of_a_reason(world: AskedWorld) -> None:
    await world.fail("one")
    await world.fail("two", ReasonCode.DECODE_TIMEOUT)
    await world.done(JobKind.RETRY, RetryArguments(places=ALL, reason=ReasonCode.DECODE_TIMEOUT))
    assert [key for key, *_ in world.written()] == ["two"]


async def test_one_by_its_id_which_is_passed_over_when_it_has_not_failed(world: AskedWorld) -> None:
    await world.fail("one")
    await world.fail("two")
    await world.index("good")
    for key in ("one", "good"):
        await world.done(JobKind.RETRY, RetryArguments(places=(), object_id=ref(key).object_id.hex()))
    assert [key for key, *_ in world.written()] == ["one"]


async def test_attempts_have_an_end(world: AskedWorld) -> None:
    await world.fail("often", attempt=MOST_ASKED_ATTEMPTS)
    await world.fail("nearly", attempt=MOST_ASKED_ATTEMPTS - 1)
    job = await world.done(JobKind.RETRY, RetryArguments(places=ALL))
    assert [key for key, *_ in world.written()] == ["nearly"]
    assert job.progress["exhausted"] == 1
    assert job.message is not None and "20 attempts already" in job.message


async def test_what_is_gone_meanwhile_is_said_to_be(world: AskedWorld) -> None:
    await world.fail("one")
    await world.delete("one")
    await world.done(JobKind.RETRY, RetryArguments(places=ALL))
    assert [(key, removed) for key, _, _, removed in world.written()] == [("one", True)]


async def test_a_verification_tells_what_it_found(world: AskedWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.verify.GRACE_SECONDS", 0.0)
    await world.add_model()
    await world.index("good")
    job = await world.done(JobKind.VERIFY, VerifyArguments())
    assert (job.state, job.progress["clean"], job.message) == (JobState.DONE, True, "bucket, rows and vectors are equal")
    await world.put("unknown")
    job = await world.done(JobKind.VERIFY, VerifyArguments(bucket=BUCKET))
    assert job.progress["clean"] is False
    assert [one["key"] for one in job.progress["findings"]["missing"]["listed"]] == ["unknown"]
    assert job.message is not None and "1 missing" in job.message
    assert world.events() == []


async def test_a_bucket_that_is_not_followed_is_not_verified(world: AskedWorld) -> None:
    job = await world.done(JobKind.VERIFY, VerifyArguments(bucket="elsewhere"))
    assert job.state is JobState.FAILED
    assert job.message is not None and "image-search buckets add elsewhere" in job.message


async def test_what_is_no_retry_fails_with_a_reason(world: AskedWorld) -> None:
    asked = await world.metadata.add_job(JobKind.RETRY, {"places": 5})
    await (await world.worker()).run_next()
    job = await world.metadata.job(asked.job_id)
    assert job is not None and job.state is JobState.FAILED
    assert job.message is not None and job.message.startswith("places: ")
