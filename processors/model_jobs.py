"""What is asked of models, as jobs: one at a time over all workers, each under a lease, taken over when a worker dies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

import structlog
from pydantic import ValidationError

from infra.errors import ImageSearchError, TransientError
from infra.followed_buckets import followed_buckets
from infra.metadata_store.interface import Job, MetadataStore
from infra.object_store.interface import ObjectStore
from infra.retry import until_done
from infra.settings import ProcessorSettings
from infra.vector_store.interface import VectorStore
from infra.verify import Report, verify_stores
from processors.embedding.open_models import OpenModels
from processors.model_changes import (
    ModelArguments,
    ReindexArguments,
    ReindexProgress,
    activate,
    add_filling_model,
    compare,
    drop,
    fill,
    find_model,
)
from processors.vectors import Vectorizer
from schemas.identity import ModelFingerprint
from schemas.tables import JobKind, JobState, ModelState

log = structlog.get_logger(__name__)

MODEL_JOBS = (JobKind.REINDEX, JobKind.COMPARE, JobKind.ACTIVATE, JobKind.DROP)
LEASE_SECONDS = 15.0
REPORT_SECONDS = 1.0
IDLE_SECONDS = 1.0


class ModelJobs:
    """`run` works on such jobs until it is cancelled; a job that it was on is then taken over when its lease has run out."""

    def __init__(
        self,
        settings: ProcessorSettings,
        *,
        objects: ObjectStore,
        metadata: MetadataStore,
        vectors: VectorStore,
        models: OpenModels[Vectorizer],
        owner: str,
    ) -> None:
        self._settings, self._objects, self._metadata, self._vectors = settings, objects, metadata, vectors
        self._models, self._owner = models, owner

    async def run(self) -> None:
        claim = partial(self._metadata.claim_job, MODEL_JOBS, owner=self._owner, lease_seconds=LEASE_SECONDS)
        while True:
            job = await until_done(claim)
            if job is None:
                await asyncio.sleep(IDLE_SECONDS)
            else:
                await self._work(job)

    async def _work(self, job: Job) -> None:
        log.info("model job begins", kind=job.kind, job=job.job_id)
        progress: dict[str, object] = {}
        running = asyncio.create_task(self._do(job, progress))
        try:
            while not running.done():
                await asyncio.wait([running], timeout=REPORT_SECONDS)
                if not running.done() and not await self._report(job, JobState.RUNNING, progress):
                    log.warning("another worker has taken over this job", job=job.job_id)
                    return
            message = await running
        except TransientError as error:
            await self._report(job, JobState.FAILED, progress, f"{error}; ask again, it goes on from where it was")
        except (ImageSearchError, ValidationError) as error:
            await self._report(job, JobState.FAILED, progress, _told(error))
        except Exception:
            log.exception("model job failed", kind=job.kind, job=job.job_id)
            await self._report(job, JobState.FAILED, progress, "internal error: the worker's log has it")
        else:
            await self._report(job, JobState.DONE, progress, message)
        finally:
            running.cancel()
            await asyncio.wait([running])

    async def _report(self, job: Job, state: JobState, progress: Mapping[str, object], message: str | None = None) -> bool:
        update = partial(self._metadata.update_job, job.job_id, owner=self._owner, state=state, progress=dict(progress))
        return await until_done(partial(update, message=message, lease_seconds=LEASE_SECONDS))

    async def _do(self, job: Job, progress: dict[str, object]) -> str:
        """What was done, in a sentence."""
        if job.kind == JobKind.REINDEX:
            return await self._reindex(ReindexArguments.model_validate(job.arguments), progress)
        asked = ModelArguments.model_validate(job.arguments).model
        if job.kind == JobKind.COMPARE:
            rows = await self._metadata.models()
            active = next(row for row in rows if row.state is ModelState.ACTIVE)
            progress |= await compare(active, find_model(rows, asked), self._metadata, self._vectors)
            return f"of ten nearest pictures, {active.name} and {asked} agree on a share of {progress['overlap_at_10']}"
        if job.kind == JobKind.ACTIVATE:
            model = await activate(asked, self._metadata, self._verified)
            return f"{model.name} answers from now on; to go back: image-search models rollback"
        model = await drop(asked, self._metadata, self._vectors)
        return f"{model.name} is dropped, and its collection {model.collection} removed"

    async def _reindex(self, arguments: ReindexArguments, told: dict[str, object]) -> str:
        progress = ReindexProgress()

        async def tell() -> None:
            while True:
                told.update(progress.model_dump())
                await asyncio.sleep(REPORT_SECONDS / 2)

        telling = asyncio.create_task(tell())
        try:
            settings = arguments.settings(self._settings)
            buckets = await followed_buckets(self._settings, self._metadata)
            model = await add_filling_model(
                settings, self._metadata, self._vectors, buckets, lambda line: log.info("model", step=line)
            )
            # Other workers open it at their next batch, in about the same time: what they miss meanwhile, a scan finds.
            await self._models.opened(model.fingerprint)
            await until_done(lambda: fill(model.fingerprint, self._metadata, buckets, progress))
        finally:
            telling.cancel()
            told.update(progress.model_dump())
        return f"{model.name} ({model.fingerprint[:12]}) is filled: image-search models activate {model.fingerprint[:12]}"

    async def _verified(self, model: ModelFingerprint) -> Report:
        buckets = await followed_buckets(self._settings, self._metadata)
        return await verify_stores(self._objects, self._metadata, self._vectors, buckets=buckets, whole=frozenset({model}))


def _told(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return str(error)
