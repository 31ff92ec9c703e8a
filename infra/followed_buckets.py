"""Which buckets are followed: those of the settings, and those that were added while everything ran."""

from __future__ import annotations

from infra.metadata_store.interface import MetadataStore
from infra.settings import CommonSettings


async def followed_buckets(settings: CommonSettings, metadata: MetadataStore) -> tuple[str, ...]:
    """The settings' first, in their order. Raises StoreUnavailable and ConfigurationError."""
    return tuple(dict.fromkeys((*settings.buckets, *await metadata.added_buckets())))
