"""A change of model without a gap: a second collection is filled while the first one answers, and then takes its place.

Filling goes through the one topic and the one pipeline: scans write events for what the new model lacks, paced by the
workers' lag, and from the moment that the model is added every put and delete goes to its collection too. What is done is
told from the rows, so whoever takes over after a crash goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from typing import Literal

import numpy as np
from pydantic import BaseModel

from infra.metadata_store.interface import MetadataStore, ModelRow
from infra.model_table import ModelChangeRefused, find_model
from infra.settings import ProcessorSettings
from infra.vector_store.interface import VectorStore
from infra.verify import Report
from processors.embedding import prepare_model
from processors.embedding.active_model import settled_by
from processors.embedding.choice import precision_asked
from processors.embedding.fastest import decided
from schemas.identity import ModelFingerprint, ObjectId
from schemas.jobs import ReindexArguments, ScanArguments
from schemas.tables import JobKind, JobState, ModelState
from schemas.vectors import collection_name

POLL_SECONDS = 0.5
SCANS_WITHOUT_PROGRESS = 3
"""Scans in a row after which nothing more was filled: then reindexing says what is missing instead of going on for ever."""
QUIET_SECONDS = 30.0
"""Time without a vector more after which the workers have done what the last scan asked for."""
COMPARED_OBJECTS = 200
COMPARED_HITS = 10
DROP_GRACE_SECONDS = 5.0
"""Longer than a worker takes from its look at the table of models to its write."""


_OF_ONE_MODEL = ("own_weights", "weights_sha256", "own_format", "own_network", "own_dimension", "own_input_pixels")
_OF_ONE_PROJECTION = ("projection", "projection_sha256", "projection_dimension")


class ReindexProgress(BaseModel):
    phase: Literal["preparing", "filling", "filled"] = "preparing"
    fingerprint: str | None = None
    filled: int = 0
    to_fill: int = 0
    eta_seconds: float | None = None


def settings_of(asked: ReindexArguments, settings: ProcessorSettings) -> ProcessorSettings:
    """The worker's settings with what was asked for. Raises ValueError (of pydantic) for what no setting can be."""
    anew = _OF_ONE_PROJECTION if asked.model == settings.model else _OF_ONE_PROJECTION + _OF_ONE_MODEL
    # Said, not left out: what is left out would be read from the environment.
    unset = {name: type(settings).model_fields[name].default for name in anew}
    return type(settings).model_validate({**settings.model_dump(), **unset, **asked.model_dump(exclude_none=True)})


async def add_filling_model(
    settings: ProcessorSettings,
    metadata: MetadataStore,
    vectors: VectorStore,
    buckets: Sequence[str],
    say: Callable[[str], None],
) -> ModelRow:
    """Prepare the model that the settings name on this host, make its collection, and have it filled from now on.

    Raises ConfigurationError, and ModelChangeRefused for the active model and the previous one. Done before: nothing happens.
    """
    # What it was begun with is gone on with. Any other collection settles nothing: a model may be calibrated anew.
    begun = settled_by(settings, await metadata.models([ModelState.FILLING]))
    settings = begun or await decided(settings, buckets, say)
    prepared = await prepare_model(settings, say)
    row = ModelRow(
        fingerprint=prepared.fingerprint,
        name=prepared.description.name,
        collection=collection_name(prepared.fingerprint, settings.milvus_collection_prefix),
        dimension=prepared.description.dimension,
        backend=settings.model_backend,
        precision=precision_asked(settings),
        description=asdict(prepared.description),
        state=ModelState.FILLING,
        created_at_us=time.time_ns() // 1000,
    )
    await vectors.create_collection(row.collection, dimension=row.dimension)
    standing = await metadata.add_model(row)
    if standing.state is ModelState.DROPPED:
        await metadata.move_models({row.fingerprint: (ModelState.DROPPED, ModelState.FILLING)})
        standing = replace(standing, state=ModelState.FILLING)
    if standing.state is not ModelState.FILLING:
        raise ModelChangeRefused(f"{standing.name} ({standing.fingerprint[:12]}) is the {standing.state} model: it is filled")
    return standing


async def fill(
    model: ModelFingerprint,
    metadata: MetadataStore,
    buckets: Sequence[str],
    progress: ReindexProgress,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    now: Callable[[], float] = time.monotonic,
    quiet_seconds: float = QUIET_SECONDS,
) -> None:
    """Have the buckets scanned until every indexed row has its vector of this model. Raises ModelChangeRefused if it stays
    behind, and StoreUnavailable."""
    progress.phase, progress.fingerprint = "filling", model
    started, before = now(), (await metadata.model_coverage(model))[0]
    without_progress = 0
    while without_progress < SCANS_WITHOUT_PROGRESS:
        at_first, _ = await metadata.model_coverage(model)
        jobs = [(await metadata.add_job(JobKind.SCAN, ScanArguments(bucket=bucket).model_dump())).job_id for bucket in buckets]
        last, since = -1, now()
        while True:
            held, indexed = await metadata.model_coverage(model)
            progress.filled, progress.to_fill = held, indexed
            rate = (held - before) / max(now() - started, 1e-3)
            progress.eta_seconds = round((indexed - held) / rate, 1) if rate > 0 else None
            ended = await _ended(metadata, jobs)
            if ended and held >= indexed:
                progress.phase, progress.eta_seconds = "filled", 0.0
                return
            if held != last or not ended:
                last, since = held, now()
            elif now() - since > quiet_seconds:
                break
            await sleep(POLL_SECONDS)
        without_progress = 0 if last > at_first else without_progress + 1
    raise ModelChangeRefused(
        f"{progress.to_fill - progress.filled} of {progress.to_fill} indexed objects still have no vector of this model, after "
        f"{SCANS_WITHOUT_PROGRESS} scans that filled none: the log of the workers says why"
    )


async def _ended(metadata: MetadataStore, jobs: Sequence[str]) -> bool:
    found = [await metadata.job(job_id) for job_id in jobs]
    for job in found:
        if job is not None and job.state in (JobState.FAILED, JobState.STOPPED):
            raise ModelChangeRefused(f"a scan did not come to its end: {job.message}")
    return all(job is None or job.state is JobState.DONE for job in found)


async def activate(name: str, metadata: MetadataStore, verified: Callable[[ModelFingerprint], Awaitable[Report]]) -> ModelRow:
    """Let this model answer from now on, if bucket, rows and its collection are equal. The active one becomes the previous."""
    rows = await metadata.models()
    chosen = find_model(rows, name)
    active = next(row for row in rows if row.state is ModelState.ACTIVE)
    if chosen.state is ModelState.ACTIVE:
        return chosen
    others = [row for row in rows if row.state is ModelState.PREVIOUS and row.fingerprint != chosen.fingerprint]
    if others:
        raise ModelChangeRefused(
            f"{others[0].name} ({others[0].fingerprint[:12]}) is still kept as the previous model, and there is room for one: "
            f"image-search models drop {others[0].fingerprint[:12]}"
        )
    report = await verified(chosen.fingerprint)
    if not report.clean:
        counts = ", ".join(f"{findings.total} {kind}" for kind, findings in report.findings.items() if findings.total)
        raise ModelChangeRefused(
            f"bucket, rows and vectors are not equal ({counts}), so {active.name} stays active. Wait until the workers are "
            "done, or run: image-search verify"
        )
    moves = {
        active.fingerprint: (ModelState.ACTIVE, ModelState.PREVIOUS),
        chosen.fingerprint: (chosen.state, ModelState.ACTIVE),
    }
    if not await metadata.move_models(moves):
        raise ModelChangeRefused("somebody else changed the models meanwhile: look at image-search models list")
    return chosen


async def drop(
    name: str,
    metadata: MetadataStore,
    vectors: VectorStore,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> ModelRow:
    """Keep this model no more, and remove its collection. The active one is refused. May be done again after a crash."""
    chosen = find_model(await metadata.models(), name, frozenset(ModelState))
    if chosen.state is ModelState.ACTIVE:
        raise ModelChangeRefused(f"{chosen.name} is the active model: activate another one first")
    if chosen.state is not ModelState.DROPPED:
        await metadata.move_models({chosen.fingerprint: (chosen.state, ModelState.DROPPED)})
    await sleep(DROP_GRACE_SECONDS)
    if await vectors.has_collection(chosen.collection):
        await vectors.drop_collection(chosen.collection)
    while await metadata.forget_model(chosen.fingerprint):
        pass
    return chosen


async def compare(first: ModelRow, second: ModelRow, metadata: MetadataStore, vectors: VectorStore) -> dict[str, object]:
    """How many of the ten nearest two models agree on, over pictures of the index taken as queries; 1.0: all of them."""
    ids: list[ObjectId] = []
    after: ObjectId | None = None
    while len(ids) < COMPARED_OBJECTS and (page := await vectors.page(first.collection, after=after, limit=COMPARED_OBJECTS)):
        after = page[-1].object_id
        ids += [entry.object_id for entry in page]
    one, other = await vectors.fetch(first.collection, ids), await vectors.fetch(second.collection, ids)
    overlaps = []
    for object_id in (object_id for object_id in ids if object_id in one and object_id in other):
        near = []
        for model, of in ((first, one), (second, other)):
            hits = await vectors.search(model.collection, of[object_id].vector, limit=COMPARED_HITS + 1)
            near.append({hit.object_id for hit in hits if hit.object_id != object_id})
        size = max(1, min(COMPARED_HITS, len(near[0]), len(near[1])))
        overlaps.append(min(1.0, len(near[0] & near[1]) / size))
    return {
        "models": [first.name, second.name],
        "fingerprints": [first.fingerprint, second.fingerprint],
        "queries": len(overlaps),
        "overlap_at_10": round(float(np.mean(overlaps)), 4) if overlaps else None,
    }
