"""Scans as jobs: asked for by a schedule or by a person, worked on one at a time under a lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog
from pydantic import ValidationError

from infra.errors import StoreUnavailable, TransientError
from infra.metadata_store.interface import Job, MetadataStore
from infra.metrics import SCANS
from infra.retry import until_done
from ingest_bridge.scan import Scan
from ingest_bridge.scan_state import RemovalStopped, ScanArguments, ScanFailed, ScanProgress
from schemas.tables import JobKind, JobState

log = structlog.get_logger(__name__)

SCAN_JOB = JobKind.SCAN
LEASE_SECONDS = 30.0
REPORT_SECONDS = 1.0
IDLE_SECONDS = 1.0
RETRY_SECONDS = 60.0
STOP_REPORT_SECONDS = 5.0


class ScanSchedule:
    """A scan of each bucket at the start, at every interval, and whenever `want` says that something may be missing."""

    def __init__(
        self,
        metadata: MetadataStore,
        buckets: Sequence[str],
        *,
        interval_seconds: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._metadata = metadata
        self._interval_seconds = interval_seconds
        self._now = now
        self._sleep = sleep
        self._due = dict.fromkeys(buckets, now())

    def want(self, bucket: str, *, after_seconds: float = 0.0) -> None:
        self._due[bucket] = min(self._due[bucket], self._now() + after_seconds)

    def want_all(self) -> None:
        for bucket in self._due:
            self.want(bucket)

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except TransientError as error:
                log.warning("scans cannot be asked for just now", reason=str(error))
            await self._sleep(IDLE_SECONDS)

    async def tick(self) -> None:
        """Ask for the scans that are due, unless one of that bucket is still to begin.

        One that is under way does not count: it may have passed by what is missing. The wish stays until it is done.
        """
        due = [bucket for bucket, at in self._due.items() if at <= self._now()]
        if not due:
            return
        whole = [job for job in await self._metadata.unfinished_jobs(SCAN_JOB) if not job.arguments.get("prefix")]
        to_begin = {job.arguments.get("bucket") for job in whole if _is_to_begin(job)}
        under_way = {job.arguments.get("bucket") for job in whole} - to_begin
        for bucket in due:
            if bucket in under_way:
                continue
            if bucket not in to_begin:
                await self._metadata.add_job(SCAN_JOB, ScanArguments(bucket=bucket).model_dump())
            self._due[bucket] = self._now() + self._interval_seconds


def _is_to_begin(job: Job) -> bool:
    """A scan that was handed back is queued as well, but goes on from where it was."""
    return job.state is JobState.QUEUED and not job.progress.get("last_key")


MakeScan = Callable[[str, ScanArguments, ScanProgress], Scan]
"""Of a job's id, what it asks for, and how far it had come."""


class ScanWorker:
    """`on_failed` hears the bucket of a scan that a fault ended, so that it can be tried again."""

    def __init__(
        self,
        metadata: MetadataStore,
        make_scan: MakeScan,
        *,
        buckets: Sequence[str],
        owner: str,
        on_failed: Callable[[str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        report_seconds: float = REPORT_SECONDS,
    ) -> None:
        self._metadata = metadata
        self._make_scan = make_scan
        self._buckets = frozenset(buckets)
        self._owner = owner
        self._on_failed = on_failed
        self._sleep = sleep
        self._report_seconds = report_seconds

    async def run(self) -> None:
        while True:
            if not await self.run_next():
                await self._sleep(IDLE_SECONDS)

    async def run_next(self) -> bool:
        """Take up a job and work on it to its end; False when there is none."""
        job = await until_done(
            lambda: self._metadata.claim_job([SCAN_JOB], owner=self._owner, lease_seconds=LEASE_SECONDS), on_wait=_waited_for
        )
        if job is None:
            return False
        try:
            arguments = ScanArguments.model_validate(job.arguments)
            progress = ScanProgress.model_validate(job.progress)
        except ValidationError:
            await self._finish(
                job, JobState.FAILED, job.progress, "this is not what a scan can be asked: bucket, prefix, allow_removal"
            )
            return True
        if arguments.bucket not in self._buckets:
            return await self._turn_down(job, arguments.bucket)
        await self._work(job, arguments, self._make_scan(job.job_id, arguments, progress))
        return True

    async def _turn_down(self, job: Job, bucket: str) -> bool:
        added = await until_done(self._metadata.added_buckets, on_wait=_waited_for)
        if bucket not in added:
            message = f"the bucket {bucket!r} is not followed: image-search buckets add {bucket}"
            await self._finish(job, JobState.FAILED, job.progress, message)
            return True
        # Added a moment ago: it waits for a bridge that has seen that, another one or this one as it begins anew.
        await until_done(lambda: self._update(job, JobState.QUEUED, job.progress, None), on_wait=_waited_for)
        return False

    async def _work(self, job: Job, arguments: ScanArguments, scan: Scan) -> None:
        log.info("scan begins", bucket=arguments.bucket, prefix=arguments.prefix, resumed=scan.progress.last_key is not None)
        running = asyncio.create_task(scan.run())
        try:
            if not await self._report_until_done(job, scan, running):
                log.warning("another bridge has taken over this scan", job=job.job_id)
                return
            await running
        except RemovalStopped as stopped:
            log.error("scan stopped", bucket=arguments.bucket, reason=str(stopped))
            await self._finish(job, JobState.STOPPED, _dump(scan), str(stopped))
        except (ScanFailed, TransientError) as failed:
            log.error("scan failed", bucket=arguments.bucket, reason=str(failed))
            await self._finish(job, JobState.FAILED, _dump(scan), str(failed))
            self._on_failed(arguments.bucket)
        except asyncio.CancelledError:
            await self._hand_back(job, scan)
            raise
        except Exception:
            await self._finish(job, JobState.FAILED, _dump(scan), "internal error: the bridge's log has it")
            raise
        else:
            log.info("scan done", bucket=arguments.bucket, prefix=arguments.prefix, **_dump(scan))
            await self._finish(job, JobState.DONE, _dump(scan), None)
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _report_until_done(self, job: Job, scan: Scan, running: asyncio.Task[None]) -> bool:
        """Keep lease and progress up to date. False when the lease was lost: somebody else works on it."""
        while True:
            await asyncio.wait([running], timeout=self._report_seconds)
            if running.done():
                return True
            try:
                if not await self._update(job, JobState.RUNNING, _dump(scan), None):
                    return False
            except StoreUnavailable as error:
                # The lease has time to spare; should it run out, the next report says so.
                log.warning("progress of a scan could not be stored", reason=str(error))

    async def _finish(self, job: Job, state: JobState, progress: Mapping[str, object], message: str | None) -> None:
        await until_done(lambda: self._update(job, state, progress, message), on_wait=_waited_for)
        SCANS.labels(state).inc()

    async def _hand_back(self, job: Job, scan: Scan) -> None:
        """The bridge stops: whoever comes next goes on from here, without waiting for the lease to run out."""
        try:
            async with asyncio.timeout(STOP_REPORT_SECONDS):
                await self._update(job, JobState.QUEUED, _dump(scan), None)
        except (TransientError, TimeoutError) as error:
            log.warning("a scan could not be handed back", reason=str(error))

    async def _update(self, job: Job, state: JobState, progress: Mapping[str, object], message: str | None) -> bool:
        return await self._metadata.update_job(
            job.job_id, owner=self._owner, state=state, progress=progress, message=message, lease_seconds=LEASE_SECONDS
        )


def _dump(scan: Scan) -> dict[str, object]:
    return scan.progress.model_dump(mode="json")


def _waited_for(error: TransientError, attempt: int) -> None:
    log.warning("scans wait", reason=str(error), attempt=attempt)
