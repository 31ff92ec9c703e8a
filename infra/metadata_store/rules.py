"""The rules of the metadata store that no database knows of: shared by the SQL store and its twin."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from infra.metadata_store.interface import ImageRow, Job, ModelRow, RowWrite
from schemas.identity import ModelFingerprint
from schemas.tables import JobState, ModelState, RowState, images, jobs

MOST_OF_ONE_CONTENT = 8
"""Objects named for one content: enough to find one whose vector is still there."""

_MESSAGE_CHARACTERS: int = images.c.message.type.length  # type: ignore[attr-defined]  # a String, by the table's definition
_JOB_MESSAGE_CHARACTERS: int = jobs.c.message.type.length  # type: ignore[attr-defined]  # as above


def in_order(writes: Sequence[RowWrite]) -> list[RowWrite]:
    """By object id, so that two batches that overlap lock their rows in the same order and do not deadlock.

    Raises ValueError for two writes of one object, for a generation that is not the seen one plus one, and for a vector of
    bytes that the row does not name.
    """
    by_id = {write.row.object_id: write for write in writes}
    if len(by_id) != len(writes):
        raise ValueError("one object is written twice in a batch")
    for write in writes:
        if write.row.generation != write.seen_generation + 1:
            raise ValueError(f"generation {write.row.generation} does not follow {write.seen_generation}: {write.row.ref}")
        if models_kept(write) and write.row.content_hash is None:
            raise ValueError(f"a vector of no known bytes: {write.row.ref}")
    return [by_id[object_id] for object_id in sorted(by_id)]


def as_stored(row: ImageRow, *, now_us: int) -> ImageRow:
    """The row with times filled in where its writer gave none, and with a message that fits and that UTF-8 can hold."""
    message = row.message
    if message is not None:
        message = message.encode("utf-8", "replace").decode()[:_MESSAGE_CHARACTERS]
    return replace(
        row,
        message=message,
        created_at_us=row.created_at_us or now_us,
        updated_at_us=row.updated_at_us or now_us,
    )


def models_kept(write: RowWrite) -> frozenset[ModelFingerprint]:
    """Only an indexed row has vectors."""
    return write.models if write.row.state is RowState.INDEXED else frozenset()


def with_creation_time(model: ModelRow, *, now_us: int) -> ModelRow:
    return replace(model, created_at_us=model.created_at_us or now_us)


def model_under_same_fingerprint(model: ModelRow, standing: Collection[ModelRow]) -> ModelRow | None:
    """Raises ValueError when `model` would be a second active one."""
    for other in standing:
        if other.fingerprint == model.fingerprint:
            return other
    if model.state is ModelState.ACTIVE and any(other.state is ModelState.ACTIVE for other in standing):
        raise ValueError("there is an active model already")
    return None


def may_move(moves: Mapping[ModelFingerprint, tuple[ModelState, ModelState]], standing: Collection[ModelRow]) -> bool:
    """Whether every model is in the state that its mover saw. Raises ValueError when two would be active."""
    states = {model.fingerprint: model.state for model in standing}
    if any(states.get(fingerprint) is not before for fingerprint, (before, _) in moves.items()):
        return False
    states |= {fingerprint: after for fingerprint, (_, after) in moves.items()}
    if list(states.values()).count(ModelState.ACTIVE) > 1:
        raise ValueError("there is an active model already")
    return True


def new_job(kind: str, arguments: Mapping[str, Any], *, now_us: int) -> Job:
    return Job(str(uuid.uuid4()), kind, dict(arguments), JobState.QUEUED, created_at_us=now_us, updated_at_us=now_us)


def holds_lease(job: Job, *, owner: str, now_us: int) -> bool:
    return job.state is JobState.RUNNING and job.owner == owner and job.lease_until_us >= now_us


def claimed(job: Job, *, owner: str, lease_seconds: float, now_us: int) -> Job:
    lease_until_us = now_us + round(lease_seconds * 1_000_000)
    return replace(job, state=JobState.RUNNING, owner=owner, lease_until_us=lease_until_us, updated_at_us=now_us)


def reported(
    job: Job, *, state: JobState, progress: Mapping[str, Any], message: str | None, lease_seconds: float, now_us: int
) -> Job:
    """A running job keeps its lease for as long as asked, any other has none."""
    return replace(
        job,
        state=state,
        progress=dict(progress),
        message=message[:_JOB_MESSAGE_CHARACTERS] if message is not None else None,
        lease_until_us=now_us + round(lease_seconds * 1_000_000) if state is JobState.RUNNING else 0,
        updated_at_us=now_us,
    )
