"""Images and the models that hold their vectors, models, jobs, cursors."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# A migration is what it was on the day it was written: it does not follow schemas/tables.py.
_OPTIONS: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
    "mariadb_collate": "utf8mb4_bin",
}


def _binary(length: int) -> TypeEngine[bytes]:
    return sa.LargeBinary(length).with_variant(mysql.BINARY(length), "mysql", "mariadb")


def _varbinary(length: int) -> TypeEngine[bytes]:
    return sa.LargeBinary(length).with_variant(mysql.VARBINARY(length), "mysql", "mariadb")


def _ascii(length: int) -> TypeEngine[str]:
    return sa.String(length).with_variant(mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")


def upgrade() -> None:
    _create_images()
    _create_models()
    _create_jobs()
    _create_cursors()


def _create_images() -> None:
    op.create_table(
        "images",
        sa.Column("object_id", _binary(32), primary_key=True),
        sa.Column("bucket", _ascii(63), nullable=False),
        sa.Column("object_key", _varbinary(1024), nullable=False),
        sa.Column("state", _ascii(16), nullable=False),
        sa.Column("content_hash", _binary(32)),
        sa.Column("md5", _binary(16)),
        sa.Column("etag", sa.String(255)),
        sa.Column("version", sa.String(255)),
        sa.Column("put_time_us", sa.BigInteger),
        sa.Column("size", sa.BigInteger),
        sa.Column("format", _ascii(16)),
        sa.Column("width", sa.Integer),
        sa.Column("height", sa.Integer),
        sa.Column("reason", _ascii(64)),
        sa.Column("message", sa.String(512)),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("published_generation", sa.BigInteger, nullable=False),
        sa.Column("owed_outcomes", sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("updated_at_us", sa.BigInteger, nullable=False),
        **_OPTIONS,
    )
    op.create_index("ix_images_content", "images", ["content_hash"])
    op.create_index("ix_images_state", "images", ["state", "updated_at_us"])
    op.create_index("ix_images_place", "images", ["bucket", "object_key"])


def _create_models() -> None:
    op.create_table(
        "image_models",
        sa.Column("object_id", _binary(32), primary_key=True),
        sa.Column("fingerprint", _ascii(64), primary_key=True),
        sa.Column("content_hash", _binary(32), nullable=False),
        **_OPTIONS,
    )
    op.create_table(
        "models",
        sa.Column("fingerprint", _ascii(64), primary_key=True),
        sa.Column("name", _ascii(64), nullable=False),
        sa.Column("collection", _ascii(128), nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
        sa.Column("backend", _ascii(32), nullable=False),
        sa.Column("precision", _ascii(16), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("state", _ascii(16), nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        **_OPTIONS,
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("job_id", _ascii(36), primary_key=True),
        sa.Column("kind", _ascii(32), nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("state", _ascii(16), nullable=False),
        sa.Column("progress", sa.Text, nullable=False),
        sa.Column("message", sa.String(1024)),
        sa.Column("owner", sa.String(128)),
        sa.Column("lease_until_us", sa.BigInteger, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("updated_at_us", sa.BigInteger, nullable=False),
        **_OPTIONS,
    )
    op.create_index("ix_jobs_state", "jobs", ["kind", "state"])


def _create_cursors() -> None:
    op.create_table(
        "cursors",
        sa.Column("name", _ascii(128), primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("clean", sa.Integer, nullable=False),
        sa.Column("updated_at_us", sa.BigInteger, nullable=False),
        **_OPTIONS,
    )
