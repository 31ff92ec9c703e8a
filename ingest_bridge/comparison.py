"""What a scan makes of an object and its row: pure rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from infra.metadata_store.interface import ImageRow, ModelRow
from infra.object_store.interface import ObjectStat
from schemas.events import RETRYABLE_REASONS, Cause
from schemas.identity import ContentHash, ModelFingerprint
from schemas.tables import ModelState, RowState

MOST_ATTEMPTS = 5
UNPUBLISHED_US = 60_000_000
"""A worker publishes within a second of its commit: a row that owes its outcome for this long has been forgotten."""
_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """Why an object needs a worker, and which attempt at these bytes it will be."""

    cause: Cause
    attempt: int = 1


def is_same_object(stat: ObjectStat, row: ImageRow) -> bool:
    """In whole seconds: listings of some stores tell more of the time than the answer to a read does."""
    return (
        row.state is not RowState.DELETED
        and row.etag == stat.etag
        and row.put_time_us is not None
        and row.put_time_us // _SECOND_US == stat.put_time_us // _SECOND_US
    )


def is_forgotten(row: ImageRow, now_us: int) -> bool:
    """Whether a row has owed its subscribers an outcome for too long."""
    return not row.is_published and row.updated_at_us < now_us - UNPUBLISHED_US


def difference(
    stat: ObjectStat,
    row: ImageRow | None,
    *,
    held: Mapping[ModelFingerprint, ContentHash],
    models: Collection[ModelRow],
    now_us: int,
) -> Difference | None:
    """None when the row says what the bucket has. `held`: which of the row's models hold a vector, and of which bytes."""
    if row is None or not is_same_object(stat, row):
        return Difference(Cause.SCAN)
    if is_forgotten(row, now_us):
        return Difference(Cause.REPAIR, row.attempt)
    if row.state is RowState.FAILED and row.reason in RETRYABLE_REASONS and row.attempt < MOST_ATTEMPTS:
        return Difference(Cause.RETRY, row.attempt + 1)
    lacking = [model for model in models if held.get(model.fingerprint) != row.content_hash]
    if row.state is RowState.INDEXED and lacking:
        # What only a model beside the active one lacks changes no answer: nothing is embedded anew, nobody is told.
        needs_repair = any(model.state is ModelState.ACTIVE for model in lacking)
        return Difference(Cause.REPAIR if needs_repair else Cause.SCAN, row.attempt)
    return None


def vector_differs(row: ImageRow | None, *, named: bool, held: ContentHash | None) -> bool:
    """Whether a collection disagrees with a row. `named`: the row says that the model holds a vector of it."""
    if row is None or row.state is not RowState.INDEXED:
        return held is not None
    if held is None:
        return named
    return held != row.content_hash


def is_left_over(stat: ObjectStat | None, row: ImageRow | None) -> bool:
    """Whether nothing owns an object's vector any more: neither the bucket nor a row that is not deleted."""
    return stat is None and (row is None or row.state is RowState.DELETED)
