"""Rows of `images` and `image_models`: the fence between writers, and everything that is asked about objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Select, and_, bindparam, case, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.metadata_store.engine import SqlPart
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.metadata_store.narrowing import in_group, in_place
from infra.metadata_store.rows import image_row, image_values, key_bytes
from infra.metadata_store.rules import MOST_OF_ONE_CONTENT, as_stored, in_order, models_kept
from schemas.filter import FilterGroup
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.tables import RowState, image_metadata, image_models, images

_NEVER_UPDATED = frozenset({"object_id", "created_at_us"})
_WRITTEN_ID, _WRITTEN_GENERATION = "written_object_id", "written_generation"

_UPDATE = (
    update(images)
    .where(images.c.object_id == bindparam(_WRITTEN_ID))
    .values({column.name: bindparam(column.name) for column in images.c if column.name not in _NEVER_UPDATED})
)

_PUBLISH = (
    update(images)
    .where(
        images.c.object_id == bindparam(_WRITTEN_ID),
        images.c.published_generation < bindparam(_WRITTEN_GENERATION),
        images.c.generation >= bindparam(_WRITTEN_GENERATION),
    )
    .values(
        published_generation=bindparam(_WRITTEN_GENERATION),
        # A later write owes outcomes of its own: they stay.
        owed_outcomes=case((images.c.generation == bindparam(_WRITTEN_GENERATION), None), else_=images.c.owed_outcomes),
    )
)


class SqlImages(SqlPart):
    async def rows(self, ids: Collection[ObjectId]) -> dict[ObjectId, ImageRow]:
        async def work(connection: AsyncConnection) -> dict[ObjectId, ImageRow]:
            found = await connection.execute(select(images).where(images.c.object_id.in_(ids)))
            return {ObjectId(row.object_id): image_row(row) for row in found}

        return await self._database.query(work) if ids else {}

    async def models_of(self, ids: Collection[ObjectId]) -> dict[ObjectId, dict[ModelFingerprint, ContentHash]]:
        async def work(connection: AsyncConnection) -> dict[ObjectId, dict[ModelFingerprint, ContentHash]]:
            models: dict[ObjectId, dict[ModelFingerprint, ContentHash]] = defaultdict(dict)
            for row in await connection.execute(select(image_models).where(image_models.c.object_id.in_(ids))):
                models[ObjectId(row.object_id)][ModelFingerprint(row.fingerprint)] = ContentHash(row.content_hash)
            return dict(models)

        return await self._database.read(work) if ids else {}

    async def write(self, writes: Sequence[RowWrite]) -> set[ObjectId]:
        ordered = in_order(writes)
        now_us = self._now_us()

        async def work(connection: AsyncConnection) -> set[ObjectId]:
            stored = await _locked_generations(connection, [write.row.object_id for write in ordered])
            winners = [write for write in ordered if stored.get(write.row.object_id, 0) == write.seen_generation]
            await _write_rows(connection, winners, now_us=now_us)
            await _write_models(connection, winners)
            return {write.row.object_id for write in ordered} - {write.row.object_id for write in winners}

        return await self._database.write(work) if ordered else set()

    async def mark_published(self, published: Mapping[ObjectId, int]) -> None:
        values = [{_WRITTEN_ID: object_id, _WRITTEN_GENERATION: published[object_id]} for object_id in sorted(published)]

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(_PUBLISH, values)

        if values:
            await self._database.write(work)

    async def indexed_with_content(self, hashes: Collection[ContentHash]) -> dict[ContentHash, list[ObjectId]]:
        age = func.row_number().over(partition_by=images.c.content_hash, order_by=(images.c.created_at_us, images.c.object_id))
        ranked = (
            select(images.c.content_hash, images.c.object_id, age.label("age"))
            .where(images.c.content_hash.in_(hashes), images.c.state == RowState.INDEXED.value)
            .subquery()
        )
        oldest = select(ranked).where(ranked.c.age <= MOST_OF_ONE_CONTENT).order_by(ranked.c.content_hash, ranked.c.age)

        async def work(connection: AsyncConnection) -> dict[ContentHash, list[ObjectId]]:
            found: dict[ContentHash, list[ObjectId]] = defaultdict(list)
            for row in await connection.execute(oldest):
                found[ContentHash(row.content_hash)].append(ObjectId(row.object_id))
            return dict(found)

        return await self._database.read(work) if hashes else {}

    async def count_with_content(
        self, hashes: Collection[ContentHash], *, where: FilterGroup | None = None
    ) -> dict[ContentHash, int]:
        indexed = and_(images.c.state == RowState.INDEXED.value, images.c.content_hash.in_(hashes))
        query = select(images.c.content_hash, func.count().label("number")).where(indexed)
        if where is not None:
            query = query.where(in_group(where))

        async def work(connection: AsyncConnection) -> dict[ContentHash, int]:
            found = await connection.execute(query.group_by(images.c.content_hash))
            return {ContentHash(row.content_hash): row.number for row in found}

        return await self._database.query(work) if hashes else {}

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
        query = select(images).where(in_place(bucket, prefix))
        if where is not None:
            query = query.where(in_group(where))
        if states is not None:
            query = query.where(images.c.state.in_([state.value for state in states]))
        if reason is not None:
            query = query.where(images.c.reason == reason)
        if after is not None:
            behind = and_(images.c.bucket == after.bucket, images.c.object_key > key_bytes(after.key))
            # The first comparison says nothing new, but it is the one that an index is entered with.
            query = query.where(images.c.bucket >= after.bucket, or_(images.c.bucket > after.bucket, behind))
        return await self._listed(query.order_by(images.c.bucket, images.c.object_key).limit(limit))

    async def counts(self, *, bucket: str | None = None, prefix: str = "") -> dict[RowState, int]:
        query = select(images.c.state, func.count().label("number")).where(in_place(bucket, prefix)).group_by(images.c.state)

        async def work(connection: AsyncConnection) -> dict[RowState, int]:
            return {RowState(row.state): row.number for row in await connection.execute(query)}

        return await self._database.read(work)

    async def failures_by_reason(self, *, bucket: str | None = None, prefix: str = "") -> dict[str, int]:
        failed = and_(images.c.state == RowState.FAILED.value, in_place(bucket, prefix))
        query = select(images.c.reason, func.count().label("number")).where(failed).group_by(images.c.reason)

        async def work(connection: AsyncConnection) -> dict[str, int]:
            return {row.reason: row.number for row in await connection.execute(query)}

        return await self._database.read(work)

    async def unpublished(self, limit: int = 1000) -> list[ImageRow]:
        owing = select(images).where(images.c.published_generation < images.c.generation)
        return await self._listed(owing.order_by(images.c.updated_at_us, images.c.object_id).limit(limit))

    async def purge_deleted(self, *, before_us: int, limit: int = 1000) -> int:
        old = (
            select(images.c.object_id)
            .where(
                images.c.state == RowState.DELETED.value,
                images.c.updated_at_us < before_us,
                images.c.published_generation >= images.c.generation,
            )
            .order_by(images.c.updated_at_us)
            .limit(limit)
            .with_for_update()
        )

        async def work(connection: AsyncConnection) -> int:
            ids = sorted((await connection.execute(old)).scalars())
            if ids:
                await connection.execute(delete(image_models).where(image_models.c.object_id.in_(ids)))
                await connection.execute(delete(image_metadata).where(image_metadata.c.object_id.in_(ids)))
                await connection.execute(delete(images).where(images.c.object_id.in_(ids)))
            return len(ids)

        return await self._database.write(work)

    async def _listed(self, query: Select[Any]) -> list[ImageRow]:
        async def work(connection: AsyncConnection) -> list[ImageRow]:
            return [image_row(row) for row in await connection.execute(query)]

        return await self._database.read(work)


async def _locked_generations(connection: AsyncConnection, ids: Sequence[ObjectId]) -> dict[ObjectId, int]:
    """What stands there now, and cannot change before our commit.

    Asked for beforehand because a server's count of changed rows does not say which of several were refused.
    """
    query = select(images.c.object_id, images.c.generation).where(images.c.object_id.in_(ids))
    found = await connection.execute(query.order_by(images.c.object_id).with_for_update())
    return {ObjectId(row.object_id): row.generation for row in found}


async def _write_rows(connection: AsyncConnection, winners: Sequence[RowWrite], *, now_us: int) -> None:
    inserted, updated = [], []
    for write in winners:
        values = image_values(as_stored(write.row, now_us=now_us))
        if write.seen_generation == 0:
            inserted.append(values)
        else:
            kept = {name: value for name, value in values.items() if name not in _NEVER_UPDATED}
            updated.append({**kept, _WRITTEN_ID: write.row.object_id})
    if inserted:
        await connection.execute(insert(images), inserted)
    if updated:
        await connection.execute(_UPDATE, updated)


async def _write_models(connection: AsyncConnection, winners: Sequence[RowWrite]) -> None:
    had_models = [write.row.object_id for write in winners if write.seen_generation > 0]
    if had_models:
        await connection.execute(delete(image_models).where(image_models.c.object_id.in_(had_models)))
    held = [
        {"object_id": write.row.object_id, "fingerprint": fingerprint, "content_hash": write.row.content_hash}
        for write in winners
        for fingerprint in sorted(models_kept(write))
    ]
    if held:
        await connection.execute(insert(image_models), held)
