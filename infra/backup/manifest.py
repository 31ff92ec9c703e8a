"""What lies in a backup: one manifest, a file a table, a file a collection.

A table's file is gzipped JSON lines, a row a line, bytes as base64. A collection's file is one record after another:
object id (32 bytes), content hash (32 bytes), the vector (float32, little-endian). The rest of a vector's row stands in the
table `images`.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigurationError
from infra.metadata_store.table_copy import table_names
from schemas import tables
from schemas.identity import ModelFingerprint

MANIFEST_FILE = "manifest.json"
ID_BYTES = 32

# A job is work of a service that runs now, and a cursor a place in a log that may have been cut meanwhile: restored, the one
# would be done again and the other would skip a gap. Without them the bridge scans, which is what is wanted.
NOT_KEPT = frozenset({tables.jobs.name, tables.cursors.name})


class FilePart(BaseModel):
    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str


class TablePart(FilePart):
    rows: int


class CollectionPart(FilePart):
    model: str
    dimension: int
    vectors: int


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    made_at: datetime
    deployment: str
    schema_version: str
    tables: dict[str, TablePart]
    collections: dict[ModelFingerprint, CollectionPart]


def kept_tables() -> list[str]:
    return [name for name in table_names() if name not in NOT_KEPT]


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigurationError when this is no whole backup, or a file of it is not as it was written."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError):
        raise ConfigurationError(
            f"{folder} is no backup that this version can read: {MANIFEST_FILE} is missing or wrong"
        ) from None
    parts: list[FilePart] = [*manifest.tables.values(), *manifest.collections.values()]
    for part in parts:
        path = folder / Path(part.file).name
        if not path.is_file() or digest(path) != part.sha256:
            raise ConfigurationError(f"{path} is missing or damaged; take another backup")
    return manifest


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_type(dimension: int) -> np.dtype[np.void]:
    return np.dtype([("object_id", "u1", (ID_BYTES,)), ("content_hash", "u1", (ID_BYTES,)), ("vector", "<f4", (dimension,))])
