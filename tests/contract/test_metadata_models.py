"""The contract of the table of models: states, and what each model holds. Every test runs on the twin and on the databases."""

from __future__ import annotations

import pytest

from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow, RowWrite
from schemas.events import ReasonCode
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef
from schemas.tables import JobKind, ModelState, RowState
from tests.contract.test_metadata_store import Stores, database_url, model_of, store, stores  # noqa: F401

A, B = ModelFingerprint("a" * 64), ModelFingerprint("b" * 64)


async def _states(of: MetadataStore) -> dict[ModelFingerprint, ModelState]:
    return {row.fingerprint: row.state for row in await of.models()}


async def _two(of: MetadataStore) -> tuple[ModelRow, ModelRow]:
    return (
        await of.add_model(model_of("a", ModelState.ACTIVE)),
        await of.add_model(model_of("b", ModelState.FILLING)),
    )


async def test_two_models_change_places_at_once_or_not_at_all(store: MetadataStore) -> None:  # noqa: F811
    await _two(store)
    swap = {A: (ModelState.ACTIVE, ModelState.PREVIOUS), B: (ModelState.FILLING, ModelState.ACTIVE)}
    assert await store.move_models(swap)
    assert await _states(store) == {A: ModelState.PREVIOUS, B: ModelState.ACTIVE}
    assert not await store.move_models(swap)
    assert not await store.move_models({ModelFingerprint("c" * 64): (ModelState.FILLING, ModelState.DROPPED)})
    assert await _states(store) == {A: ModelState.PREVIOUS, B: ModelState.ACTIVE}


async def test_two_active_models_are_refused(store: MetadataStore) -> None:  # noqa: F811
    await _two(store)
    with pytest.raises(ValueError, match="active"):
        await store.move_models({B: (ModelState.FILLING, ModelState.ACTIVE)})
    assert await _states(store) == {A: ModelState.ACTIVE, B: ModelState.FILLING}


def _write(key: str, content: bytes, models: frozenset[ModelFingerprint], *, state: RowState = RowState.INDEXED) -> RowWrite:
    row = ImageRow(ObjectRef("images", key), state, 1, 1, content_hash=ContentHash(content * 32))
    return RowWrite(row, 0, models)


async def test_what_a_model_holds_is_counted_and_forgotten(store: MetadataStore) -> None:  # noqa: F811
    await store.write(
        [
            _write("both", b"1", frozenset({A, B})),
            _write("one", b"2", frozenset({A})),
            _write("none", b"3", frozenset()),
            _write("failed", b"4", frozenset(), state=RowState.FAILED),
        ]
    )
    assert await store.model_coverage(A) == (2, 3)
    assert await store.model_coverage(B) == (1, 3)
    assert await store.forget_model(A, limit=1) == 1
    assert await store.forget_model(A, limit=5) == 1
    assert await store.forget_model(A) == 0
    assert await store.model_coverage(A) == (0, 3)
    assert await store.model_coverage(B) == (1, 3)


async def test_failures_are_counted_and_listed_by_reason(store: MetadataStore) -> None:  # noqa: F811
    rows = [
        ImageRow(ObjectRef("images", "a/one"), RowState.FAILED, 1, 1, reason=ReasonCode.CORRUPT_IMAGE),
        ImageRow(ObjectRef("images", "a/two"), RowState.FAILED, 1, 1, reason=ReasonCode.DECODE_TIMEOUT),
        ImageRow(ObjectRef("images", "b/one"), RowState.FAILED, 1, 1, reason=ReasonCode.CORRUPT_IMAGE),
        ImageRow(ObjectRef("images", "b/two"), RowState.IGNORED, 1, 1, reason=ReasonCode.DIRECTORY_MARKER),
        ImageRow(ObjectRef("images", "c"), RowState.INDEXED, 1, 1, content_hash=ContentHash(b"1" * 32)),
    ]
    await store.write([RowWrite(row, 0, frozenset()) for row in rows])
    assert await store.failures_by_reason() == {"CORRUPT_IMAGE": 2, "DECODE_TIMEOUT": 1}
    assert await store.failures_by_reason(bucket="images", prefix="a/") == {"CORRUPT_IMAGE": 1, "DECODE_TIMEOUT": 1}
    assert await store.failures_by_reason(bucket="elsewhere") == {}
    found = await store.list_rows(states=[RowState.FAILED], reason=ReasonCode.CORRUPT_IMAGE)
    assert [row.ref.key for row in found] == ["a/one", "b/one"]


async def test_jobs_are_listed_newest_first(stores: Stores) -> None:  # noqa: F811
    for kind in (JobKind.SCAN, JobKind.RETRY, JobKind.SCAN):
        stores.clock.now_us += 1
        await stores.store.add_job(kind, {"number": stores.clock.now_us})
    whole = await stores.another().list_jobs()
    assert [job.kind for job in whole] == ["scan", "retry", "scan"]
    assert whole[0].created_at_us > whole[2].created_at_us
    assert await stores.store.list_jobs(kinds=[JobKind.SCAN], limit=1) == [whole[0]]
