"""Weights that lie in the object store, brought here by the process that has its keys: the converting one is told none."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from infra import object_store
from infra.errors import ConfigurationError, ImageSearchError
from infra.object_store import ObjectStream
from infra.settings import ProcessorSettings, QuerySettings
from processors.embedding.catalog import BucketFile, ModelDescription
from processors.embedding.download import LARGEST_DOWNLOAD_BYTES
from processors.embedding.weights import WeightFolders, by_hand, find_weights, partial_download, wanted_projection
from schemas.identity import ObjectRef


async def bring_from_bucket(
    description: ModelDescription, settings: ProcessorSettings | QuerySettings, say: Callable[[str], None]
) -> None:
    """The weights and the projection; nothing is done for those from elsewhere, or here. Raises ConfigurationError."""
    projection = wanted_projection(description)
    if projection is not None:
        await _bring(projection, settings, say)
    await _bring(description, settings, say)


async def _bring(
    description: ModelDescription, settings: ProcessorSettings | QuerySettings, say: Callable[[str], None]
) -> None:
    source, folders = description.weights.source, WeightFolders.from_settings(settings)
    if not isinstance(source, BucketFile) or find_weights(description, folders) is not None:
        return
    place = f"s3://{source.bucket}/{source.key}"
    say(f"downloading {place}")
    partial = partial_download(description, folders).with_suffix(f".{os.getpid()}")
    try:
        folders.downloads.mkdir(parents=True, exist_ok=True)
        store = await object_store.connect(settings)
        try:
            async with store.open(ObjectRef(source.bucket, source.key)) as stream:
                found = await _write(stream, partial, say)
        finally:
            await store.close()
        if found != description.weights.sha256:
            raise ConfigurationError(
                f"{place} is not the expected file: its sha256 is {found}. {by_hand(description, folders)}"
            )
        partial.replace(folders.downloads / description.weights.file_name)
    except ConfigurationError:
        raise
    except (ImageSearchError, OSError) as error:
        raise ConfigurationError(f"{place} cannot be read ({error}). {by_hand(description, folders)}") from error
    finally:
        partial.unlink(missing_ok=True)


async def _write(stream: ObjectStream, path: Path, say: Callable[[str], None]) -> str:
    """Returns the sha256 of what was written."""
    total, done, digest = stream.stat.size, 0, hashlib.sha256()
    if total > LARGEST_DOWNLOAD_BYTES:
        raise OSError("the file is too large")
    file = await asyncio.to_thread(path.open, "wb")
    try:
        async for chunk in stream.chunks:
            await asyncio.to_thread(file.write, chunk)
            digest.update(chunk)
            done += len(chunk)
            if done * 10 // total > (done - len(chunk)) * 10 // total:
                say(f"  {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        await asyncio.to_thread(file.flush)
        await asyncio.to_thread(os.fsync, file.fileno())
    finally:
        await asyncio.to_thread(file.close)
    return digest.hexdigest()
