"""Taking a backup, beside live traffic: pages of rows and vectors, never more than a page in memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import numpy as np

from infra import metadata_store, vector_store
from infra.backup.manifest import (
    MANIFEST_FILE,
    CollectionPart,
    Manifest,
    TablePart,
    digest,
    kept_tables,
    record_type,
)
from infra.errors import ConfigurationError
from infra.metadata_store.interface import ModelRow
from infra.metadata_store.schema import head_version
from infra.metadata_store.table_copy import Row, TableCopy, as_json
from infra.settings import CommonSettings
from infra.vector_store.interface import VectorStore
from schemas.tables import ModelState
from schemas.vectors import StoredVector

PAGE_ROWS = 1000

Progress = Callable[[str, int, int], None]
"""Hears what is being copied, how much of it so far, and about how much there is."""


async def take_backup(settings: CommonSettings, folder: Path, progress: Progress) -> Manifest:
    """Write a backup into `folder`, which must not be there yet and is only there when it is whole.

    Rows are read first, vectors after them, while the world moves on: what changed in between is found by a scan after a
    restore. Raises StoreUnavailable and ConfigurationError.
    """
    with _new_folder(folder) as scratch:
        async with AsyncExitStack() as stack:
            copy = TableCopy(settings)
            stack.push_async_callback(copy.close)
            metadata = await metadata_store.connect(settings)
            stack.push_async_callback(metadata.close)
            vectors = await vector_store.connect(settings)
            stack.push_async_callback(vectors.close)
            await copy.check()
            tables = {name: await _table(copy, name, scratch, progress) for name in kept_tables()}
            collections = {
                model.fingerprint: await _collection(vectors, model, scratch, progress)
                for model in await metadata.models()
                if model.state is not ModelState.DROPPED and await vectors.has_collection(model.collection)
            }
        manifest = Manifest(
            made_at=datetime.now(UTC),
            deployment=settings.deployment,
            schema_version=head_version(),
            tables=tables,
            collections=collections,
        )
        with _private(scratch / MANIFEST_FILE) as file:
            file.write(manifest.model_dump_json(indent=1).encode())
    return manifest


async def _table(copy: TableCopy, table: str, scratch: Path, progress: Progress) -> TablePart:
    name, total, done = f"{table}.jsonl.gz", await copy.count(table), 0
    after: Row | None = None
    with _private(scratch / name) as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as lines:
        progress(table, 0, total)
        while page := await copy.page(table, after, PAGE_ROWS):
            lines.write(_lines(page))
            after, done = page[-1], done + len(page)
            progress(table, done, max(total, done))
    return TablePart(file=name, rows=done, sha256=digest(scratch / name))


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(as_json(row), separators=(",", ":")) + "\n" for row in rows).encode()


async def _collection(vectors: VectorStore, model: ModelRow, scratch: Path, progress: Progress) -> CollectionPart:
    name, total, done = f"{model.fingerprint[:16]}.vectors", await vectors.count(model.collection), 0
    what = f"vectors of {model.name}"
    with _private(scratch / name) as file:
        progress(what, 0, total)
        after = None
        while page := await vectors.page(model.collection, after=after, limit=PAGE_ROWS):
            after = page[-1].object_id
            stored = await vectors.fetch(model.collection, [entry.object_id for entry in page])
            file.write(_records(list(stored.values()), model.dimension))
            done += len(stored)
            progress(what, done, max(total, done))
    return CollectionPart(file=name, model=model.name, dimension=model.dimension, vectors=done, sha256=digest(scratch / name))


def _records(stored: Sequence[StoredVector], dimension: int) -> bytes:
    records = np.empty(len(stored), dtype=record_type(dimension))
    for record, one in zip(records, stored, strict=True):
        record["object_id"] = np.frombuffer(one.object_id, np.uint8)
        record["content_hash"] = np.frombuffer(one.content_hash, np.uint8)
        record["vector"] = one.vector
    return records.tobytes()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its name when everything in it is on the disk."""
    if folder.exists():
        raise ConfigurationError(f"{folder} is there already: name a new folder")
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # left by one that was killed
    try:
        # 0700 and 0600: it holds what people wrote about their pictures.
        scratch.mkdir(mode=0o700, parents=True)
        yield scratch
        _to_disk(scratch)
        scratch.rename(folder)
        _to_disk(folder.absolute().parent)
    except OSError as error:
        raise ConfigurationError(f"cannot write the backup to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    """The names in it: files are flushed one by one as they are written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _private(path: Path) -> Iterator[IO[bytes]]:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
