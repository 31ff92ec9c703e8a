"""What is asked of models, as jobs: one at a time over all workers, each under a lease, taken over when a worker dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import structlog

from infra.followed_buckets import followed_buckets
from infra.jobs import REPORT_SECONDS, JobWorker
from infra.metadata_store.interface import Job, MetadataStore
from infra.model_table import find_model
from infra.object_store.interface import ObjectStore
from infra.retry import until_done
from infra.settings import ProcessorSettings
from infra.vector_store.interface import VectorStore
from infra.verify import Report, verify_stores
from processors.embedding.open_models import OpenModels
from processors.model_changes import ReindexProgress, activate, add_filling_model, compare, drop, fill, settings_of
from processors.vectors import Vectorizer
from schemas.identity import ModelFingerprint
from schemas.jobs import ModelArguments, ReindexArguments
from schemas.tables import JobKind, ModelState

log = structlog.get_logger(__name__)

MODEL_JOBS = (JobKind.REINDEX, JobKind.COMPARE, JobKind.ACTIVATE, JobKind.DROP)
LEASE_SECONDS = 15.0


class ModelJobs(JobWorker):
    """One that stops hands its job back; the next goes on from what the rows say."""

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
        super().__init__(metadata, MODEL_JOBS, owner=owner, lease_seconds=LEASE_SECONDS)
        self._settings, self._objects, self._vectors, self._models = settings, objects, vectors, models

    async def run(self) -> None:
        """An error of our own ends its job, and not the worker, which has pictures to embed."""
        while True:
            try:
                await super().run()
            except Exception:
                log.exception("a job on a model failed")

    async def open(self, job: Job) -> _ModelWork:
        if job.kind == JobKind.REINDEX:
            return _ModelWork(partial(self._reindex, ReindexArguments.model_validate(job.arguments)))
        asked = ModelArguments.model_validate(job.arguments).model
        if job.kind == JobKind.COMPARE:
            return _ModelWork(partial(self._compare, asked))
        if job.kind == JobKind.ACTIVATE:
            return _ModelWork(partial(self._activate, asked))
        return _ModelWork(partial(self._drop, asked))

    async def _compare(self, asked: str, told: dict[str, object]) -> str:
        rows = await self._metadata.models()
        active = next(row for row in rows if row.state is ModelState.ACTIVE)
        told |= await compare(active, find_model(rows, asked), self._metadata, self._vectors)
        return f"of ten nearest pictures, {active.name} and {asked} agree on a share of {told['overlap_at_10']}"

    async def _activate(self, asked: str, _told: dict[str, object]) -> str:
        model = await activate(asked, self._metadata, self._verified)
        return f"{model.name} answers from now on; to go back: image-search models rollback"

    async def _drop(self, asked: str, _told: dict[str, object]) -> str:
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
            settings = settings_of(arguments, self._settings)
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


class _ModelWork:
    def __init__(self, do: Callable[[dict[str, object]], Awaitable[str]]) -> None:
        self._do = do
        self._told: dict[str, object] = {}

    def told(self) -> Mapping[str, object]:
        return dict(self._told)

    async def run(self) -> str:
        return await self._do(self._told)
