"""The small tables: models, jobs, cursors and added buckets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.metadata_store.engine import SqlPart
from infra.metadata_store.interface import Cursor, Job, ModelRow
from infra.metadata_store.rows import job_row, job_values, model_row, model_values
from infra.metadata_store.rules import (
    claimed,
    holds_lease,
    may_move,
    model_under_same_fingerprint,
    new_job,
    reported,
    with_creation_time,
)
from schemas.identity import ModelFingerprint
from schemas.tables import (
    JobState,
    ModelState,
    RowState,
    cursors,
    followed_buckets,
    image_models,
    images,
    jobs,
    log_cursor_name,
    models,
)


class SqlModels(SqlPart):
    async def models(self, states: Collection[ModelState] | None = None) -> list[ModelRow]:
        query = select(models).order_by(models.c.created_at_us, models.c.fingerprint)
        if states is not None:
            query = query.where(models.c.state.in_([state.value for state in states]))

        async def work(connection: AsyncConnection) -> list[ModelRow]:
            return [model_row(row) for row in await connection.execute(query)]

        return await self._database.read(work)

    async def add_model(self, model: ModelRow) -> ModelRow:
        model = with_creation_time(model, now_us=self._now_us())

        async def work(connection: AsyncConnection) -> ModelRow:
            standing = [model_row(row) for row in await connection.execute(select(models).with_for_update())]
            same = model_under_same_fingerprint(model, standing)
            if same is None:
                await connection.execute(insert(models), [model_values(model)])
            return same or model

        return await self._database.write(work, serial=True)

    async def move_models(self, moves: Mapping[ModelFingerprint, tuple[ModelState, ModelState]]) -> bool:
        async def work(connection: AsyncConnection) -> bool:
            standing = [model_row(row) for row in await connection.execute(select(models).with_for_update())]
            if not may_move(moves, standing):
                return False
            for fingerprint, (_, state) in moves.items():
                await connection.execute(update(models).where(models.c.fingerprint == fingerprint).values(state=state.value))
            return True

        return await self._database.write(work, serial=True)

    async def model_coverage(self, model: ModelFingerprint) -> tuple[int, int]:
        same = and_(
            image_models.c.object_id == images.c.object_id,
            image_models.c.fingerprint == model,
            image_models.c.content_hash == images.c.content_hash,
        )
        query = select(func.count(image_models.c.object_id), func.count()).select_from(images.outerjoin(image_models, same))
        query = query.where(images.c.state == RowState.INDEXED.value)

        async def work(connection: AsyncConnection) -> tuple[int, int]:
            held, indexed = (await connection.execute(query)).one()
            return held, indexed

        return await self._database.read(work)

    async def forget_model(self, model: ModelFingerprint, *, limit: int = 1000) -> int:
        some = select(image_models.c.object_id).where(image_models.c.fingerprint == model).limit(limit)

        async def work(connection: AsyncConnection) -> int:
            ids = list((await connection.execute(some)).scalars())
            mine = and_(image_models.c.fingerprint == model, image_models.c.object_id.in_(ids))
            await connection.execute(delete(image_models).where(mine))
            return len(ids)

        return await self._database.write(work)


class SqlJobs(SqlPart):
    async def add_job(self, kind: str, arguments: Mapping[str, Any]) -> Job:
        job = new_job(kind, arguments, now_us=self._now_us())

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(jobs), [job_values(job)])

        await self._database.write(work)
        return job

    async def job(self, job_id: str) -> Job | None:
        async def work(connection: AsyncConnection) -> Job | None:
            row = (await connection.execute(select(jobs).where(jobs.c.job_id == job_id))).one_or_none()
            return job_row(row) if row is not None else None

        return await self._database.read(work)

    async def claim_job(self, kinds: Collection[str], *, owner: str, lease_seconds: float) -> Job | None:
        now_us = self._now_us()
        deserted = and_(jobs.c.state == JobState.RUNNING.value, jobs.c.lease_until_us < now_us)
        oldest_free = (
            select(jobs)
            .where(jobs.c.kind.in_(kinds), or_(jobs.c.state == JobState.QUEUED.value, deserted))
            .order_by(jobs.c.created_at_us, jobs.c.job_id)
            .limit(1)
            .with_for_update()
        )

        async def work(connection: AsyncConnection) -> Job | None:
            row = (await connection.execute(oldest_free)).one_or_none()
            if row is None:
                return None
            job = claimed(job_row(row), owner=owner, lease_seconds=lease_seconds, now_us=now_us)
            await _replace_job(connection, job)
            return job

        return await self._database.write(work) if kinds else None

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
        now_us = self._now_us()

        async def work(connection: AsyncConnection) -> bool:
            query = select(jobs).where(jobs.c.job_id == job_id).with_for_update()
            row = (await connection.execute(query)).one_or_none()
            if row is None or not holds_lease(job_row(row), owner=owner, now_us=now_us):
                return False
            await _replace_job(
                connection,
                reported(
                    job_row(row),
                    state=state,
                    progress=progress,
                    message=message,
                    lease_seconds=lease_seconds,
                    now_us=now_us,
                ),
            )
            return True

        return await self._database.write(work)

    async def unfinished_jobs(self, kind: str) -> list[Job]:
        unfinished = (JobState.QUEUED.value, JobState.RUNNING.value)
        query = select(jobs).where(jobs.c.kind == kind, jobs.c.state.in_(unfinished))

        async def work(connection: AsyncConnection) -> list[Job]:
            return [job_row(row) for row in await connection.execute(query.order_by(jobs.c.created_at_us, jobs.c.job_id))]

        return await self._database.read(work)

    async def list_jobs(self, *, kinds: Collection[str] | None = None, limit: int = 100) -> list[Job]:
        query = select(jobs).order_by(jobs.c.created_at_us.desc(), jobs.c.job_id.desc()).limit(limit)
        if kinds is not None:
            query = query.where(jobs.c.kind.in_(kinds))

        async def work(connection: AsyncConnection) -> list[Job]:
            return [job_row(row) for row in await connection.execute(query)]

        return await self._database.read(work)


async def _replace_job(connection: AsyncConnection, job: Job) -> None:
    values = job_values(job)
    await connection.execute(update(jobs).where(jobs.c.job_id == job.job_id).values(values))


class SqlCursors(SqlPart):
    async def cursor(self, name: str) -> Cursor | None:
        async def work(connection: AsyncConnection) -> Cursor | None:
            row = (await connection.execute(select(cursors).where(cursors.c.name == name))).one_or_none()
            return Cursor(row.position, bool(row.clean)) if row is not None else None

        return await self._database.read(work)

    async def save_cursor(self, name: str, cursor: Cursor) -> None:
        values = {"position": cursor.position, "clean": int(cursor.clean), "updated_at_us": self._now_us()}
        standing = select(cursors.c.name).where(cursors.c.name == name).with_for_update()

        async def work(connection: AsyncConnection) -> None:
            if (await connection.execute(standing)).one_or_none() is None:
                await connection.execute(insert(cursors), [{"name": name, **values}])
            else:
                await connection.execute(update(cursors).where(cursors.c.name == name).values(values))

        await self._database.write(work)


class SqlBuckets(SqlPart):
    async def added_buckets(self) -> list[str]:
        query = select(followed_buckets.c.bucket).order_by(followed_buckets.c.bucket)

        async def work(connection: AsyncConnection) -> list[str]:
            return [str(name) for name in (await connection.execute(query)).scalars()]

        return await self._database.read(work)

    async def add_bucket(self, bucket: str) -> None:
        values = {"bucket": bucket, "added_at_us": self._now_us()}
        standing = select(followed_buckets.c.bucket).where(followed_buckets.c.bucket == bucket).with_for_update()

        async def work(connection: AsyncConnection) -> None:
            if (await connection.execute(standing)).one_or_none() is None:
                await connection.execute(insert(followed_buckets), [values])
                await connection.execute(delete(cursors).where(cursors.c.name == log_cursor_name(bucket)))

        # Serial: of two that add it at once, the second finds it there.
        await self._database.write(work, serial=True)

    async def remove_bucket(self, bucket: str) -> bool:
        async def work(connection: AsyncConnection) -> bool:
            return bool(
                (await connection.execute(delete(followed_buckets).where(followed_buckets.c.bucket == bucket))).rowcount
            )

        return await self._database.write(work)
