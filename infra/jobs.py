"""Jobs: asked for by anyone, worked on one at a time under a lease, taken over when their owner dies."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Protocol

import structlog
from pydantic import BaseModel, ValidationError

from infra.errors import ImageSearchError, PermanentError, StoreUnavailable, TransientError
from infra.metadata_store.interface import Job, MetadataStore
from infra.retry import until_done
from schemas.tables import JobKind, JobState

log = structlog.get_logger(__name__)

LEASE_SECONDS = 30.0
REPORT_SECONDS = 1.0
IDLE_SECONDS = 1.0
STOP_REPORT_SECONDS = 5.0


async def ask(metadata: MetadataStore, kind: JobKind, arguments: BaseModel, *, anew: bool = False) -> Job:
    """A job for this. One that asks for the same is returned, unless it has ended or, with `anew`, begun.

    Raises StoreUnavailable.
    """
    asked = arguments.model_dump(mode="json", exclude_none=True)
    unfinished = await metadata.unfinished_jobs(kind)
    same = [job for job in unfinished if job.arguments == asked and not (anew and job.state is JobState.RUNNING)]
    return same[-1] if same else await metadata.add_job(kind, asked)


class Work(Protocol):
    """What one job asks for. `told` may be read at any time: it is the job's progress."""

    def told(self) -> Mapping[str, object]: ...

    async def run(self) -> str | None:
        """What was done, in a sentence. Raises ImageSearchError when it could not be."""


class JobTurnedDown(PermanentError):
    """The job fails before it begins. The message says what to do."""


class NotHere(PermanentError):
    """Somebody else has to take this job up: it is put back."""


class JobWorker(ABC):
    """`run` works on jobs of these kinds until it is cancelled; the job that it is on is then handed back."""

    def __init__(
        self,
        metadata: MetadataStore,
        kinds: Collection[JobKind],
        *,
        owner: str,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        report_seconds: float = REPORT_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._metadata, self._kinds, self._owner = metadata, kinds, owner
        self._sleep, self._report_seconds, self._lease_seconds = sleep, report_seconds, lease_seconds

    # -- for a subclass ----------------------------------------------------------------------------------------------
    @abstractmethod
    async def open(self, job: Job) -> Work:
        """Raises JobTurnedDown, NotHere, and ValidationError for arguments that are none."""

    def state_after(self, error: ImageSearchError) -> JobState:
        """How a job ends that this ended."""
        return JobState.FAILED

    def after(self, job: Job, state: JobState) -> None:  # noqa: B027 - most have nothing to do then
        """Hears of every job that has ended here."""

    # -- the work ----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        while True:
            if not await self.run_next():
                await self._sleep(IDLE_SECONDS)

    async def run_next(self) -> bool:
        """Take up a job and work on it to its end; False when there is none for this worker."""
        claim = partial(self._metadata.claim_job, self._kinds, owner=self._owner, lease_seconds=self._lease_seconds)
        job = await until_done(claim, on_wait=_waited_for)
        if job is None:
            return False
        try:
            work = await self.open(job)
        except NotHere:
            await until_done(partial(self._update, job, JobState.QUEUED, job.progress, None), on_wait=_waited_for)
            return False
        except (JobTurnedDown, ValidationError) as error:
            await self._finish(job, JobState.FAILED, job.progress, _words(error))
            return True
        await self._work(job, work)
        return True

    async def _work(self, job: Job, work: Work) -> None:
        said = log.bind(kind=job.kind, job=job.job_id, **job.arguments)
        said.info("job begins", resumed=bool(job.progress))
        running = asyncio.create_task(work.run())
        try:
            if not await self._report_until_done(job, work, running):
                said.warning("somebody else has taken over this job")
                return
            message = await running
        except ImageSearchError as error:
            said.error("job failed", reason=str(error))
            await self._finish(job, self.state_after(error), work.told(), str(error))
        except ValidationError as error:
            await self._finish(job, JobState.FAILED, work.told(), _words(error))
        except asyncio.CancelledError:
            await self._hand_back(job, work)
            raise
        except Exception:
            await self._finish(job, JobState.FAILED, work.told(), "internal error: the log of the service has it")
            raise
        else:
            said.info("job done", **work.told())
            await self._finish(job, JobState.DONE, work.told(), message)
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _report_until_done(self, job: Job, work: Work, running: asyncio.Task[str | None]) -> bool:
        """Keep lease and progress up to date. False when the lease was lost: somebody else works on it."""
        while True:
            await asyncio.wait([running], timeout=self._report_seconds)
            if running.done():
                return True
            try:
                if not await self._update(job, JobState.RUNNING, work.told(), None):
                    return False
            except StoreUnavailable as error:
                # The lease has time to spare; should it run out, the next report says so.
                log.warning("progress of a job could not be stored", job=job.job_id, reason=str(error))

    async def _finish(self, job: Job, state: JobState, told: Mapping[str, object], message: str | None) -> None:
        await until_done(partial(self._update, job, state, told, message), on_wait=_waited_for)
        self.after(job, state)

    async def _hand_back(self, job: Job, work: Work) -> None:
        """The process stops: whoever comes next goes on from here, without waiting for the lease to run out."""
        try:
            async with asyncio.timeout(STOP_REPORT_SECONDS):
                await self._update(job, JobState.QUEUED, work.told(), None)
        except (TransientError, TimeoutError) as error:
            log.warning("a job could not be handed back", job=job.job_id, reason=str(error))

    async def _update(self, job: Job, state: JobState, told: Mapping[str, object], message: str | None) -> bool:
        return await self._metadata.update_job(
            job.job_id, owner=self._owner, state=state, progress=told, message=message, lease_seconds=self._lease_seconds
        )


def _words(error: JobTurnedDown | ValidationError) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_input=False))
    return str(error)


def _waited_for(error: TransientError, attempt: int) -> None:
    log.warning("jobs wait", reason=str(error), attempt=attempt)
