"""The object store: the only home of miniopy-async."""

from __future__ import annotations

from infra.object_store.interface import NotificationRule, ObjectStat, ObjectStore, ObjectStream, StoredObject
from infra.object_store.s3 import S3ObjectStore
from infra.settings import CommonSettings

__all__ = ["NotificationRule", "ObjectStat", "ObjectStore", "ObjectStream", "StoredObject", "connect"]


async def connect(settings: CommonSettings) -> ObjectStore:
    """A client for the store of these settings. Nothing is sent before its first call; close it in the end."""
    return S3ObjectStore.from_settings(settings)
