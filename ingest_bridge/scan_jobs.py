"""Scans as jobs: asked for by a schedule or by a person, worked on one at a time under a lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from infra.errors import ImageSearchError, TransientError
from infra.jobs import IDLE_SECONDS, REPORT_SECONDS, JobTurnedDown, JobWorker, NotHere
from infra.metadata_store.interface import Job, MetadataStore
from infra.metrics import SCANS
from infra.retry import until_done
from ingest_bridge.scan import Scan
from ingest_bridge.scan_state import RemovalStopped, ScanProgress
from schemas.jobs import ScanArguments
from schemas.tables import JobKind, JobState

log = structlog.get_logger(__name__)

SCAN_JOB = JobKind.SCAN
RETRY_SECONDS = 60.0


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


class ScanWorker(JobWorker):
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
        super().__init__(metadata, [SCAN_JOB], owner=owner, sleep=sleep, report_seconds=report_seconds)
        self._make_scan = make_scan
        self._buckets = frozenset(buckets)
        self._on_failed = on_failed

    async def open(self, job: Job) -> _ScanWork:
        arguments = ScanArguments.model_validate(job.arguments)
        if arguments.bucket not in self._buckets:
            raise await self._not_followed(arguments.bucket)
        return _ScanWork(self._make_scan(job.job_id, arguments, ScanProgress.model_validate(job.progress)))

    async def _not_followed(self, bucket: str) -> JobTurnedDown | NotHere:
        if bucket not in await until_done(self._metadata.added_buckets):
            return JobTurnedDown(f"the bucket {bucket!r} is not followed: image-search buckets add {bucket}")
        # Added a moment ago: the scan waits for a bridge that has seen that, another one or this one as it begins anew.
        return NotHere(f"the bucket {bucket!r} is not followed here yet")

    def state_after(self, error: ImageSearchError) -> JobState:
        return JobState.STOPPED if isinstance(error, RemovalStopped) else JobState.FAILED

    def after(self, job: Job, state: JobState) -> None:
        SCANS.labels(state).inc()
        # One that never began fails again as it did; one that was stopped waits for a person.
        if state is JobState.FAILED and job.arguments.get("bucket") in self._buckets:
            self._on_failed(job.arguments["bucket"])


class _ScanWork:
    def __init__(self, scan: Scan) -> None:
        self._scan = scan

    def told(self) -> Mapping[str, object]:
        return self._scan.progress.model_dump(mode="json")

    async def run(self) -> None:
        await self._scan.run()
