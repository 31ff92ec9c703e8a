"""Whole tables by name, a page at a time and without their meaning: what a backup takes out and a restore puts back."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Insert, LargeBinary, Table, and_, func, or_, select
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.metadata_store.engine import Database, parse_url
from infra.metadata_store.schema import check_version
from infra.settings import CommonSettings
from schemas.tables import metadata

Row = Mapping[str, Any]


def table_names() -> list[str]:
    return [table.name for table in metadata.sorted_tables]


def as_json(row: Row) -> dict[str, Any]:
    """Bytes as base64, all else as it is."""
    return {name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in row.items()}


def from_json(table: str, row: Row) -> dict[str, Any]:
    binary = {column.key for column in metadata.tables[table].columns if isinstance(column.type, LargeBinary)}
    return {name: base64.b64decode(value) if name in binary and value is not None else value for name, value in row.items()}


class TableCopy:
    """Belongs to the event loop that first uses it. Every method raises StoreUnavailable."""

    def __init__(self, settings: CommonSettings) -> None:
        self._database = Database(
            parse_url(settings.database_url.get_secret_value()),
            pool_size=settings.database_pool_size,
            timeout_seconds=settings.database_timeout_seconds,
        )

    async def check(self) -> None:
        """Raises ConfigurationError unless the database has the schema of this version."""
        await check_version(self._database)

    async def count(self, table: str) -> int:
        question = select(func.count()).select_from(metadata.tables[table])

        async def work(connection: AsyncConnection) -> int:
            return int((await connection.execute(question)).scalar_one())

        return await self._database.read(work)

    async def page(self, table: str, after: Row | None, limit: int) -> list[Row]:
        """Rows in the order of the primary key, behind `after`."""
        columns = list(metadata.tables[table].primary_key.columns)
        question = select(metadata.tables[table]).order_by(*columns).limit(limit)
        if after is not None:
            question = question.where(_behind(columns, after))

        async def work(connection: AsyncConnection) -> list[Row]:
            return [dict(row) for row in (await connection.execute(question)).mappings()]

        return await self._database.read(work)

    async def add(self, table: str, rows: Sequence[Row]) -> None:
        """Insert; a row whose key is there already stays as it is."""

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(_insert_new(connection.dialect.name, metadata.tables[table]), [dict(row) for row in rows])

        if rows:
            await self._database.write(work)

    async def close(self) -> None:
        await self._database.close()


def _behind(columns: Sequence[ColumnElement[Any]], after: Row) -> ColumnElement[bool]:
    # Spelled out: MySQL reads no range of an index for a comparison of whole rows.
    return or_(
        *(
            and_(*(earlier == after[str(earlier.key)] for earlier in columns[:place]), column > after[str(column.key)])
            for place, column in enumerate(columns)
        )
    )


def _insert_new(dialect: str, table: Table) -> Insert:
    if dialect == "sqlite":
        return sqlite.insert(table).on_conflict_do_nothing()
    # Not INSERT IGNORE, which would also cut short what is too long, and say nothing.
    key = next(iter(table.primary_key.columns))
    return mysql.insert(table).on_duplicate_key_update({str(key.key): key})
