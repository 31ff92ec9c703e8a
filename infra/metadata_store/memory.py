"""The metadata store without a database: same rules, one process, nothing kept."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from infra.metadata_store.engine import now_us
from infra.metadata_store.interface import ApiKey, Cursor, ImageRow, Job, ModelRow, RowWrite
from infra.metadata_store.rows import key_bytes
from infra.metadata_store.rules import (
    MOST_OF_ONE_CONTENT,
    as_stored,
    claimed,
    holds_lease,
    in_order,
    may_move,
    model_under_same_fingerprint,
    models_kept,
    new_job,
    reported,
    with_creation_time,
)
from schemas.filter import Filter, FilterGroup
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.metadata import Metadata, merged, written
from schemas.tables import JobState, ModelState, RowState, log_cursor_name


class MemoryMetadataStore:
    """No method waits for anything, so each is a transaction of its own."""

    def __init__(self, now_us: Callable[[], int] = now_us) -> None:
        self._now_us = now_us
        self._images: dict[ObjectId, ImageRow] = {}
        self._image_models: dict[ObjectId, dict[ModelFingerprint, ContentHash]] = {}
        self._models: dict[ModelFingerprint, ModelRow] = {}
        self._jobs: dict[str, Job] = {}
        self._cursors: dict[str, Cursor] = {}
        self._buckets: set[str] = set()
        self._api_keys: dict[str, ApiKey] = {}
        self._own_metadata: dict[ObjectId, str] = {}

    async def rows(self, ids: Collection[ObjectId]) -> dict[ObjectId, ImageRow]:
        return {object_id: self._images[object_id] for object_id in ids if object_id in self._images}

    async def models_of(self, ids: Collection[ObjectId]) -> dict[ObjectId, dict[ModelFingerprint, ContentHash]]:
        return {object_id: dict(self._image_models[object_id]) for object_id in ids if self._image_models.get(object_id)}

    async def write(self, writes: Sequence[RowWrite]) -> set[ObjectId]:
        ordered = in_order(writes)
        now = self._now_us()
        losers = set()
        for write in ordered:
            object_id = write.row.object_id
            standing = self._images.get(object_id)
            if (standing.generation if standing else 0) != write.seen_generation:
                losers.add(object_id)
                continue
            row = as_stored(write.row, now_us=now)
            self._images[object_id] = replace(row, created_at_us=standing.created_at_us) if standing else row
            if write.row.content_hash is not None:
                self._image_models[object_id] = dict.fromkeys(models_kept(write), write.row.content_hash)
            else:
                self._image_models.pop(object_id, None)
        return losers

    async def mark_published(self, published: Mapping[ObjectId, int]) -> None:
        for object_id, generation in published.items():
            row = self._images.get(object_id)
            if row is None or not row.published_generation < generation <= row.generation:
                continue
            owed = () if generation == row.generation else row.owed_outcomes
            self._images[object_id] = replace(row, published_generation=generation, owed_outcomes=owed)

    async def indexed_with_content(self, hashes: Collection[ContentHash]) -> dict[ContentHash, list[ObjectId]]:
        found: dict[ContentHash, list[ObjectId]] = defaultdict(list)
        for row in sorted(self._images.values(), key=lambda row: (row.created_at_us, row.object_id)):
            if row.content_hash is None or row.content_hash not in hashes or row.state is not RowState.INDEXED:
                continue
            if len(found[row.content_hash]) < MOST_OF_ONE_CONTENT:
                found[row.content_hash].append(row.object_id)
        return dict(found)

    async def count_with_content(
        self, hashes: Collection[ContentHash], *, where: FilterGroup | None = None
    ) -> dict[ContentHash, int]:
        rows = (row for row in self._narrowed(Filter(where=where)) if row.state is RowState.INDEXED)
        return dict(Counter(row.content_hash for row in rows if row.content_hash is not None and row.content_hash in hashes))

    async def list_rows(
        self,
        *,
        bucket: str | None = None,
        prefix: str = "",
        where: FilterGroup | None = None,
        states: Collection[RowState] | None = None,
        reason: str | None = None,
        after: ObjectRef | None = None,
        limit: int = 1000,
    ) -> list[ImageRow]:
        rows = [
            row
            for row in self._narrowed(Filter(bucket, prefix, where))
            if (states is None or row.state in states)
            and (reason is None or row.reason == reason)
            and (after is None or _place(row.ref) > _place(after))
        ]
        return sorted(rows, key=lambda row: _place(row.ref))[:limit]

    async def counts(self, *, bucket: str | None = None, prefix: str = "") -> dict[RowState, int]:
        return dict(Counter(row.state for row in self._narrowed(Filter(bucket, prefix))))

    async def failures_by_reason(self, *, bucket: str | None = None, prefix: str = "") -> dict[str, int]:
        failed = (row for row in self._narrowed(Filter(bucket, prefix)) if row.state is RowState.FAILED)
        return dict(Counter(str(row.reason) for row in failed))

    async def unpublished(self, limit: int = 1000) -> list[ImageRow]:
        owing = [row for row in self._images.values() if not row.is_published]
        return sorted(owing, key=lambda row: (row.updated_at_us, row.object_id))[:limit]

    async def purge_deleted(self, *, before_us: int, limit: int = 1000) -> int:
        old = [
            row
            for row in self._images.values()
            if row.state is RowState.DELETED and row.updated_at_us < before_us and row.is_published
        ]
        purged = sorted(old, key=lambda row: row.updated_at_us)[:limit]
        for row in purged:
            del self._images[row.object_id]
            self._image_models.pop(row.object_id, None)
            self._own_metadata.pop(row.object_id, None)
        return len(purged)

    async def models(self, states: Collection[ModelState] | None = None) -> list[ModelRow]:
        models = [model for model in self._models.values() if states is None or model.state in states]
        return sorted(models, key=lambda model: (model.created_at_us, model.fingerprint))

    async def add_model(self, model: ModelRow) -> ModelRow:
        same = model_under_same_fingerprint(model, self._models.values())
        return same or self._models.setdefault(model.fingerprint, with_creation_time(model, now_us=self._now_us()))

    async def move_models(self, moves: Mapping[ModelFingerprint, tuple[ModelState, ModelState]]) -> bool:
        if not may_move(moves, self._models.values()):
            return False
        for fingerprint, (_, state) in moves.items():
            self._models[fingerprint] = replace(self._models[fingerprint], state=state)
        return True

    async def model_coverage(self, model: ModelFingerprint) -> tuple[int, int]:
        indexed = [row for row in self._images.values() if row.state is RowState.INDEXED]
        held = [row for row in indexed if self._image_models.get(row.object_id, {}).get(model) == row.content_hash]
        return len(held), len(indexed)

    async def forget_model(self, model: ModelFingerprint, *, limit: int = 1000) -> int:
        holders = [held for held in self._image_models.values() if model in held][:limit]
        for held in holders:
            del held[model]
        return len(holders)

    async def add_job(self, kind: str, arguments: Mapping[str, Any]) -> Job:
        job = new_job(kind, arguments, now_us=self._now_us())
        self._jobs[job.job_id] = job
        return job

    async def job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    async def claim_job(self, kinds: Collection[str], *, owner: str, lease_seconds: float) -> Job | None:
        now = self._now_us()
        free = [
            job
            for job in self._unfinished()
            if job.kind in kinds and (job.state is JobState.QUEUED or job.lease_until_us < now)
        ]
        if not free:
            return None
        job = claimed(free[0], owner=owner, lease_seconds=lease_seconds, now_us=now)
        self._jobs[job.job_id] = job
        return job

    async def update_job(
        self,
        job_id: str,
        *,
        owner: str,
        state: JobState,
        progress: Mapping[str, Any],
        message: str | None = None,
        lease_seconds: float = 0.0,
    ) -> bool:
        now = self._now_us()
        job = self._jobs.get(job_id)
        if job is None or not holds_lease(job, owner=owner, now_us=now):
            return False
        self._jobs[job_id] = reported(
            job, state=state, progress=progress, message=message, lease_seconds=lease_seconds, now_us=now
        )
        return True

    async def unfinished_jobs(self, kind: str) -> list[Job]:
        return [job for job in self._unfinished() if job.kind == kind]

    async def list_jobs(self, *, kinds: Collection[str] | None = None, limit: int = 100) -> list[Job]:
        asked = [job for job in self._jobs.values() if kinds is None or job.kind in kinds]
        return sorted(asked, key=lambda job: (job.created_at_us, job.job_id), reverse=True)[:limit]

    async def cursor(self, name: str) -> Cursor | None:
        return self._cursors.get(name)

    async def save_cursor(self, name: str, cursor: Cursor) -> None:
        self._cursors[name] = cursor

    async def added_buckets(self) -> list[str]:
        return sorted(self._buckets)

    async def add_bucket(self, bucket: str) -> None:
        if bucket not in self._buckets:
            self._cursors.pop(log_cursor_name(bucket), None)
        self._buckets.add(bucket)

    async def remove_bucket(self, bucket: str) -> bool:
        known = bucket in self._buckets
        self._buckets.discard(bucket)
        return known

    async def add_api_key(self, key: ApiKey) -> ApiKey:
        return self._api_keys.setdefault(key.key_id, replace(key, created_at_us=self._now_us()))

    async def api_key(self, key_id: str) -> ApiKey | None:
        return self._api_keys.get(key_id)

    async def api_keys(self) -> list[ApiKey]:
        return sorted(self._api_keys.values(), key=lambda key: (key.created_at_us, key.key_id))

    async def revoke_api_key(self, key_id: str) -> bool:
        key = self._api_keys.get(key_id)
        if key is not None and key.revoked_at_us is None:
            self._api_keys[key_id] = replace(key, revoked_at_us=self._now_us())
        return key is not None

    async def note_api_key_uses(self, uses: Mapping[str, int]) -> None:
        for key_id in uses.keys() & self._api_keys.keys():
            key = self._api_keys[key_id]
            self._api_keys[key_id] = replace(key, last_used_at_us=max(key.last_used_at_us or 0, uses[key_id]))

    async def own_metadata(self, ids: Collection[ObjectId]) -> dict[ObjectId, Metadata]:
        return {object_id: json.loads(self._own_metadata[object_id]) for object_id in ids if object_id in self._own_metadata}

    async def patch_own_metadata(self, object_id: ObjectId, patch: Mapping[str, Any]) -> Metadata:
        document = merged(json.loads(self._own_metadata.get(object_id, "{}")), patch)
        self._own_metadata[object_id] = written(document)
        return document

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def _narrowed(self, narrow: Filter) -> Iterator[ImageRow]:
        return (row for row in self._images.values() if narrow.matches(row))

    def _unfinished(self) -> list[Job]:
        unfinished = [job for job in self._jobs.values() if job.state in (JobState.QUEUED, JobState.RUNNING)]
        return sorted(unfinished, key=lambda job: (job.created_at_us, job.job_id))


def _place(ref: ObjectRef) -> tuple[str, bytes]:
    return ref.bucket, key_bytes(ref.key)
