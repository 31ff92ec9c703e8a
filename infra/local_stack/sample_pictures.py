"""The pictures that a first start puts into the empty bucket. samples/SOURCES.md names author and licence of each."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from infra import object_store
from infra.settings import CommonSettings
from schemas.identity import ObjectRef

FOLDER = Path(__file__).with_name("samples")
KEY_PREFIX = "samples/"


def paths() -> list[Path]:
    return sorted(path for path in FOLDER.iterdir() if path.suffix in {".jpg", ".png", ".webp"})


def key_of(path: Path) -> str:
    return f"{KEY_PREFIX}{path.name}"


async def put_if_empty(settings: CommonSettings) -> int:
    """Put them all into the first bucket unless it holds something; returns how many were put. Raises StoreUnavailable."""
    bucket = settings.buckets[0]
    store = await object_store.connect(settings)
    try:
        async for page in store.list_pages(bucket):
            if page:
                return 0
        for path in paths():
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            await store.put(ObjectRef(bucket, key_of(path)), path.read_bytes(), kind)
    finally:
        await store.close()
    return len(paths())
