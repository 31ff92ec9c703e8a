"""Keys of the HTTP API, in SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sqlalchemy import insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.metadata_store.engine import SqlPart
from infra.metadata_store.interface import ApiKey
from infra.metadata_store.rows import api_key_row, api_key_values
from schemas.tables import api_keys


class SqlApiKeys(SqlPart):
    async def add_api_key(self, key: ApiKey) -> ApiKey:
        stored = replace(key, created_at_us=self._now_us())

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(api_keys), [api_key_values(stored)])

        await self._database.write(work)
        return stored

    async def api_key(self, key_id: str) -> ApiKey | None:
        async def work(connection: AsyncConnection) -> ApiKey | None:
            row = (await connection.execute(select(api_keys).where(api_keys.c.key_id == key_id))).one_or_none()
            # MySQL compares without the spaces at the end.
            return api_key_row(row) if row is not None and row.key_id == key_id else None

        return await self._database.read(work)

    async def api_keys(self) -> list[ApiKey]:
        query = select(api_keys).order_by(api_keys.c.created_at_us, api_keys.c.key_id)

        async def work(connection: AsyncConnection) -> list[ApiKey]:
            return [api_key_row(row) for row in await connection.execute(query)]

        return await self._database.read(work)

    async def revoke_api_key(self, key_id: str) -> bool:
        now_us = self._now_us()
        this = api_keys.c.key_id == key_id

        async def work(connection: AsyncConnection) -> bool:
            found = (await connection.execute(select(api_keys.c.key_id).where(this).with_for_update())).one_or_none()
            if found is not None:
                first_time = update(api_keys).where(this, api_keys.c.revoked_at_us.is_(None))
                await connection.execute(first_time.values(revoked_at_us=now_us))
            return found is not None

        return await self._database.write(work)

    async def note_api_key_uses(self, uses: Mapping[str, int]) -> None:
        async def work(connection: AsyncConnection) -> None:
            # In one order everywhere, so that two services that write the same keys do not wait for each other.
            for key_id, used_at_us in sorted(uses.items()):
                earlier = or_(api_keys.c.last_used_at_us.is_(None), api_keys.c.last_used_at_us < used_at_us)
                this = update(api_keys).where(api_keys.c.key_id == key_id, earlier)
                await connection.execute(this.values(last_used_at_us=used_at_us))

        if uses:
            await self._database.write(work)
