"""The SQL store: one row an object, and the small tables around it."""

from __future__ import annotations

from infra.metadata_store.engine import Database, parse_url
from infra.metadata_store.interface import MetadataStore
from infra.metadata_store.memory import MemoryMetadataStore
from infra.metadata_store.schema import upgrade_schema
from infra.metadata_store.sql import SqlMetadataStore
from infra.settings import CommonSettings

__all__ = ["MemoryMetadataStore", "MetadataStore", "SqlMetadataStore", "connect", "upgrade_schema"]


async def connect(settings: CommonSettings) -> MetadataStore:
    """Opens no connection yet. Raises ConfigurationError for a URL that is none of ours."""
    return SqlMetadataStore(
        Database(
            parse_url(settings.database_url.get_secret_value()),
            pool_size=settings.database_pool_size,
            timeout_seconds=settings.database_timeout_seconds,
        )
    )
