"""What people say of images, in SQL."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.metadata_store.engine import SqlPart
from schemas.identity import ObjectId
from schemas.metadata import Metadata, merged, written
from schemas.tables import image_metadata


class SqlOwnMetadata(SqlPart):
    async def own_metadata(self, ids: Collection[ObjectId]) -> dict[ObjectId, Metadata]:
        question = select(image_metadata.c.object_id, image_metadata.c.document).where(
            image_metadata.c.object_id.in_(sorted(ids))
        )

        async def work(connection: AsyncConnection) -> dict[ObjectId, Metadata]:
            return {ObjectId(row.object_id): json.loads(row.document) for row in await connection.execute(question)}

        return await self._database.read(work)

    async def patch_own_metadata(self, object_id: ObjectId, patch: Mapping[str, Any]) -> Metadata:
        is_here = image_metadata.c.object_id == object_id
        standing = select(image_metadata.c.document).where(is_here).with_for_update()

        async def work(connection: AsyncConnection) -> Metadata:
            text = (await connection.execute(standing)).scalar_one_or_none()
            document = merged({} if text is None else json.loads(text), patch)
            values = {"document": written(document), "updated_at_us": self._now_us()}
            if text is None:
                await connection.execute(insert(image_metadata), [{"object_id": object_id, **values}])
            else:
                await connection.execute(update(image_metadata).where(is_here).values(values))
            return document

        # Serial: of two first patches at once, the second sees what the first wrote.
        return await self._database.write(work, serial=True)
