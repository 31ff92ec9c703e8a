"""Filters in SQL. Every value is a bound parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, not_, or_

from infra.metadata_store.rows import key_bytes
from schemas.filter import Between, Condition, FieldName, FilterGroup, OneOf, StartsWith, Test
from schemas.tables import images

_COLUMNS: Mapping[FieldName, ColumnElement[Any]] = {
    "bucket": images.c.bucket,
    "key": images.c.object_key,
    "content_hash": images.c.content_hash,
    "put_time": images.c.put_time_us,
    "size": images.c.size,
    "width": images.c.width,
    "height": images.c.height,
    "format": images.c.format,
}


def in_place(bucket: str | None, prefix: str) -> ColumnElement[bool]:
    """Rows of this bucket (None: of any) whose key starts with these bytes, as a range that an index can answer."""
    parts: list[ColumnElement[bool]] = []
    if bucket is not None:
        parts.append(images.c.bucket == bucket)
    if prefix:
        parts.append(_starts_with(prefix))
    return and_(True, *parts)


def in_group(group: FilterGroup) -> ColumnElement[bool]:
    """True or false for every row, never NULL: under NOT it would stay NULL and leave out what it should let in."""
    parts = [_holds(clause) for clause in group.must]
    if group.should:
        parts.append(or_(*(_holds(clause) for clause in group.should)))
    parts += [not_(_holds(clause)) for clause in group.must_not]
    return and_(True, *parts)


def _holds(clause: Condition | FilterGroup) -> ColumnElement[bool]:
    if isinstance(clause, FilterGroup):
        return in_group(clause)
    column = _COLUMNS[clause.field]
    return and_(column.is_not(None), _compared(column, clause.test))


def _compared(column: ColumnElement[Any], test: Test) -> ColumnElement[bool]:
    match test:
        case OneOf(values):
            is_key = column is images.c.object_key
            return column.in_([key_bytes(value) if is_key else value for value in values])
        case StartsWith(prefix):
            return _starts_with(prefix)
        case Between():
            return _between(column, test)


def _starts_with(prefix: str) -> ColumnElement[bool]:
    first = key_bytes(prefix)
    # No byte of UTF-8 is 0xFF, so the last one can always be raised.
    return and_(images.c.object_key >= first, images.c.object_key < first[:-1] + bytes([first[-1] + 1]))


def _between(column: ColumnElement[Any], bounds: Between) -> ColumnElement[bool]:
    parts: list[ColumnElement[bool]] = []
    if bounds.gt is not None:
        parts.append(column > bounds.gt)
    if bounds.gte is not None:
        parts.append(column >= bounds.gte)
    if bounds.lt is not None:
        parts.append(column < bounds.lt)
    if bounds.lte is not None:
        parts.append(column <= bounds.lte)
    return and_(True, *parts)
