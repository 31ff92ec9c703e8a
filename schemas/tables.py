"""The SQL tables, for MySQL 8, MariaDB 10.6+ and SQLite. Migrations in infra/migrations make exactly these.

Bytes compare as bytes: `A.jpg`, `a.jpg` and `a.jpg ` are three keys, so keys are VARBINARY and bucket names ascii_bin.
Times are integers: microseconds since 1970-01-01 UTC, because SQLite has no type for them and MySQL's would round.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

metadata = MetaData()

_OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_bin",
}


def _binary(length: int) -> TypeEngine[bytes]:
    return LargeBinary(length).with_variant(mysql.BINARY(length), "mysql", "mariadb")


def _varbinary(length: int) -> TypeEngine[bytes]:
    return LargeBinary(length).with_variant(mysql.VARBINARY(length), "mysql", "mariadb")


def _ascii(length: int) -> TypeEngine[str]:
    exact = mysql.VARCHAR(length, charset="ascii", collation="ascii_bin")
    return String(length).with_variant(exact, "mysql", "mariadb")


class RowState(StrEnum):
    INDEXED = "indexed"
    FAILED = "failed"
    IGNORED = "ignored"
    DELETED = "deleted"


class ModelState(StrEnum):
    FILLING = "filling"
    ACTIVE = "active"
    PREVIOUS = "previous"
    DROPPED = "dropped"


KEPT_STATES = frozenset(ModelState) - {ModelState.DROPPED}
"""Models whose collections are kept equal to the bucket: also the previous one, so that one can go back."""


class JobKind(StrEnum):
    """The bridge works on the first three, the workers on models."""

    SCAN = "scan"
    RETRY = "retry"
    VERIFY = "verify"
    REINDEX = "reindex"
    COMPARE = "compare"
    ACTIVATE = "activate"
    DROP = "drop"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


images = Table(
    "images",
    metadata,
    Column("object_id", _binary(32), primary_key=True),
    Column("bucket", _ascii(63), nullable=False),
    Column("object_key", _varbinary(1024), nullable=False),
    Column("state", _ascii(16), nullable=False),
    Column("content_hash", _binary(32)),
    Column("md5", _binary(16)),
    Column("etag", String(255)),
    Column("version", String(255)),
    Column("put_time_us", BigInteger),
    Column("size", BigInteger),
    Column("format", _ascii(16)),
    Column("width", Integer),
    Column("height", Integer),
    Column("reason", _ascii(64)),
    Column("message", String(512)),
    Column("attempt", Integer, nullable=False),
    # The fence between writers: every write raises it by one, and only from the value that the writer saw.
    Column("generation", BigInteger, nullable=False),
    # The last generation whose outcomes the broker has. Below `generation`: the row still owes `owed_outcomes`.
    Column("published_generation", BigInteger, nullable=False),
    # A JSON list of outcome events, written in the same transaction as the row so that a crash cannot lose them.
    Column("owed_outcomes", Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")),
    Column("created_at_us", BigInteger, nullable=False),
    Column("updated_at_us", BigInteger, nullable=False),
    Index("ix_images_content", "content_hash"),
    Index("ix_images_state", "state", "updated_at_us"),
    Index("ix_images_place", "bucket", "object_key"),
    **_OPTIONS,
)

image_models = Table(
    "image_models",
    metadata,
    Column("object_id", _binary(32), primary_key=True),
    Column("fingerprint", _ascii(64), primary_key=True),
    Column("content_hash", _binary(32), nullable=False),
    **_OPTIONS,
)
"""Which model's collection holds a vector of which bytes. No row: none."""

models = Table(
    "models",
    metadata,
    Column("fingerprint", _ascii(64), primary_key=True),
    Column("name", _ascii(64), nullable=False),
    Column("collection", _ascii(128), nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("backend", _ascii(32), nullable=False),
    Column("precision", _ascii(16), nullable=False),
    Column("description", Text, nullable=False),  # JSON: the whole frozen row, for people and for the check at start
    Column("state", _ascii(16), nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    **_OPTIONS,
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", _ascii(36), primary_key=True),
    Column("kind", _ascii(32), nullable=False),
    Column("arguments", Text, nullable=False),  # JSON
    Column("state", _ascii(16), nullable=False),
    Column("progress", Text, nullable=False),  # JSON
    Column("message", String(1024)),
    Column("owner", String(128)),
    Column("lease_until_us", BigInteger, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("updated_at_us", BigInteger, nullable=False),
    Index("ix_jobs_state", "kind", "state"),
    **_OPTIONS,
)
"""Work that one service asks of another, taken up under a lease by the service that owns the kind."""

cursors = Table(
    "cursors",
    metadata,
    Column("name", _ascii(128), primary_key=True),
    Column("position", BigInteger, nullable=False),
    # 0 while its owner runs, 1 after a clean stop: found 0 at a start, something may have been missed, and a scan looks.
    Column("clean", Integer, nullable=False),
    Column("updated_at_us", BigInteger, nullable=False),
    **_OPTIONS,
)
"""How far a reader of a store's change log has come. The position is the log's own (SeaweedFS: nanoseconds)."""

followed_buckets = Table(
    "followed_buckets",
    metadata,
    Column("bucket", _ascii(63), primary_key=True),
    Column("added_at_us", BigInteger, nullable=False),
    **_OPTIONS,
)
"""Buckets that are followed besides those of the settings: they come and go while everything runs."""

api_keys = Table(
    "api_keys",
    metadata,
    # The part of a key that may be shown: it says which key, and opens nothing.
    Column("key_id", _ascii(16), primary_key=True),
    Column("secret_hash", _binary(32), nullable=False),  # sha256 of the whole key, which is random: nothing to stretch
    Column("name", String(128), nullable=False),
    Column("scopes", _ascii(64), nullable=False),  # comma-separated
    Column("places", Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb"), nullable=False),  # JSON list; empty: all
    Column("created_at_us", BigInteger, nullable=False),
    Column("expires_at_us", BigInteger),
    Column("last_used_at_us", BigInteger),
    Column("revoked_at_us", BigInteger),
    **_OPTIONS,
)
"""Keys of the HTTP API. A revoked one stays, so that the audit log's ids keep their names."""

image_metadata = Table(
    "image_metadata",
    metadata,
    Column("object_id", _binary(32), primary_key=True),
    Column("document", Text, nullable=False),  # a JSON object of 16 KB at most (schemas/metadata.py)
    Column("updated_at_us", BigInteger, nullable=False),
    **_OPTIONS,
)
"""What people say of an object. A table of its own: whatever is written to the object's row leaves it as it is."""


def log_cursor_name(bucket: str) -> str:
    """Name of the cursor that tells how far the bridge has handed over a bucket's change log (nanoseconds since 1970)."""
    return f"seaweedfs/{bucket}"
