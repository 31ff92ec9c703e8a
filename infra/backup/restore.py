"""From a backup's folder into empty stores that `upgrade` has made."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra import metadata_store, vector_store
from infra.backup.manifest import CollectionPart, Manifest, kept_tables, read_manifest, record_type
from infra.backup.take import PAGE_ROWS, Progress
from infra.errors import ConfigurationError
from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow
from infra.metadata_store.schema import head_version
from infra.metadata_store.table_copy import TableCopy, from_json
from infra.settings import CommonSettings
from infra.vector_store.interface import VectorStore
from schemas import tables
from schemas.identity import ContentHash, ModelFingerprint, ObjectId
from schemas.tables import ModelState, RowState
from schemas.vectors import VectorRow

GENERATION_STEP = 1_000_000
"""What a restore adds to every generation. The broker may still hold outcomes from after the backup, and a subscriber who drops
older generations must not drop the next change: it has to be above all that was ever told."""

_Records = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Restored:
    """`passed_over`: vectors that no restored row names; a scan has their pictures embedded anew if they are still there."""

    rows: int
    vectors: int
    passed_over: int


async def restore_backup(settings: CommonSettings, folder: Path, progress: Progress, *, go_on: bool = False) -> Restored:
    """Write rows, then vectors. Services must not run meanwhile.

    `go_on`: the stores may hold a part of it already; what is there stays as it is.
    Raises ConfigurationError (a damaged backup, another schema or model, stores that are not empty) and StoreUnavailable.
    """
    manifest = read_manifest(folder)
    async with AsyncExitStack() as stack:
        copy = TableCopy(settings)
        stack.push_async_callback(copy.close)
        metadata = await metadata_store.connect(settings)
        stack.push_async_callback(metadata.close)
        vectors = await vector_store.connect(settings)
        stack.push_async_callback(vectors.close)
        await copy.check()
        part, model = await _fitting(manifest, metadata)
        if not go_on and (await copy.count(tables.images.name) or await vectors.count(model.collection)):
            raise ConfigurationError(
                "the stores are not empty. Restore into empty ones, or with --continue if an earlier restore of this backup "
                "was interrupted: what is there stays as it is"
            )
        rows = await _restore_tables(copy, manifest, folder, model.fingerprint, progress)
        pages = _records(folder / part.file, part.dimension)
        write = partial(_restore_page, metadata, vectors, model.collection)
        written = await _restore_vectors(pages, write, partial(progress, f"vectors of {part.model}"), part.vectors)
    return Restored(rows, written, part.vectors - written)


async def _fitting(manifest: Manifest, metadata: MetadataStore) -> tuple[CollectionPart, ModelRow]:
    """The backup's part for the model that these stores were made with, and that model as it is noted here."""
    if manifest.schema_version != head_version():
        raise ConfigurationError(
            f"the backup has schema version {manifest.schema_version}, this program {head_version()}: restore it with the "
            "version that made it, then upgrade"
        )
    active = await metadata.models([ModelState.ACTIVE])
    if not active:
        raise ConfigurationError("the stores have no model yet. Run: image-search upgrade")
    if active[0].fingerprint not in manifest.collections:
        known = ", ".join(f"{part.model} ({print_[:16]})" for print_, part in manifest.collections.items()) or "none"
        raise ConfigurationError(
            f"these stores are made for {active[0].name}, fingerprint {active[0].fingerprint[:16]}; the backup has vectors of: "
            f"{known}. Set IMAGE_SEARCH_MODEL to one of them, empty the stores, and run `image-search upgrade` again"
        )
    return manifest.collections[active[0].fingerprint], active[0]


async def _restore_tables(
    copy: TableCopy, manifest: Manifest, folder: Path, model: ModelFingerprint, progress: Progress
) -> int:
    restored = 0
    for table in kept_tables():
        # The model of these stores is the one that `upgrade` noted: its collection may have another name here.
        if table == tables.models.name or table not in manifest.tables:
            continue
        part, done = manifest.tables[table], 0
        progress(table, 0, part.rows)
        for page in _pages(folder / part.file):
            rows = [from_json(table, row) for row in page]
            await copy.add(table, _fit_for_here(table, rows, model))
            done += len(rows)
            progress(table, done, part.rows)
        if table == tables.images.name:
            restored = done
    return restored


def _fit_for_here(table: str, rows: list[dict[str, Any]], model: ModelFingerprint) -> list[dict[str, Any]]:
    if table == tables.images.name:
        return [_later(row) for row in rows]
    if table == tables.image_models.name:
        # Of another model no vector is restored: a row that names one would keep it from ever being made.
        return [row for row in rows if row["fingerprint"] == model]
    return rows


def _later(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: row[name] + GENERATION_STEP for name in ("generation", "published_generation")}


def _pages(path: Path) -> Iterator[list[dict[str, Any]]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        while page := [json.loads(line) for line in itertools.islice(lines, PAGE_ROWS)]:
            yield page


async def _restore_vectors(
    pages: Iterator[_Records], write: Callable[[_Records], Awaitable[int]], progress: Callable[[int, int], None], total: int
) -> int:
    written = done = 0
    progress(0, total)
    for records in pages:
        written += await write(records)
        done += len(records)
        progress(done, total)
    return written


async def _restore_page(metadata: MetadataStore, vectors: VectorStore, collection: str, records: _Records) -> int:
    rows = await metadata.rows([ObjectId(record["object_id"].tobytes()) for record in records])
    found = _vector_rows(records, rows)
    if found:
        await vectors.upsert(collection, found)
    return len(found)


def _records(path: Path, dimension: int) -> Iterator[_Records]:
    kind = record_type(dimension)
    with path.open("rb") as file:
        while block := file.read(PAGE_ROWS * kind.itemsize):
            yield np.frombuffer(block, dtype=kind)


def _vector_rows(records: _Records, rows: dict[ObjectId, ImageRow]) -> Sequence[VectorRow]:
    """Only where the row is of the same bytes: rows and vectors were read at different moments."""
    found = []
    for record in records:
        row = rows.get(ObjectId(record["object_id"].tobytes()))
        content_hash = ContentHash(record["content_hash"].tobytes())
        if row is None or row.state is not RowState.INDEXED or row.content_hash != content_hash:
            continue
        found.append(
            VectorRow(
                object_id=row.object_id,
                vector=record["vector"].astype(np.float32),
                ref=row.ref,
                content_hash=content_hash,
                put_time_us=row.put_time_us or 0,
                size=row.size or 0,
                width=row.width or 0,
                height=row.height or 0,
                format=row.format or "",
            )
        )
    return found
