"""The metadata store on SQLite, MySQL and MariaDB."""

from __future__ import annotations

from infra.metadata_store.api_keys import SqlApiKeys
from infra.metadata_store.images import SqlImages
from infra.metadata_store.own_metadata import SqlOwnMetadata
from infra.metadata_store.registry import SqlBuckets, SqlCursors, SqlJobs, SqlModels
from infra.metadata_store.schema import check_version


class SqlMetadataStore(SqlImages, SqlModels, SqlJobs, SqlCursors, SqlBuckets, SqlApiKeys, SqlOwnMetadata):
    """Every part shares one pool of connections, which belongs to the event loop that first uses it."""

    async def check(self) -> None:
        await check_version(self._database)

    async def close(self) -> None:
        await self._database.close()
