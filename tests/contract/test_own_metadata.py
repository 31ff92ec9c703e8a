"""What people say of images: one suite over the metadata store and its twin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.metadata_store import MemoryMetadataStore, MetadataStore, SqlMetadataStore, upgrade_schema
from infra.metadata_store.engine import Database, parse_url
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.settings import CommonSettings
from schemas.identity import ObjectRef
from schemas.metadata import LARGEST_METADATA_BYTES
from schemas.tables import RowState
from tests.conftest import FreshSettings

REF = ObjectRef("images", "a.jpg")


@pytest.fixture(params=["memory", "sqlite", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """None: the twin's turn."""
    if request.param == "mariadb":
        full_settings: FreshSettings = request.getfixturevalue("full_settings")
        return full_settings(CommonSettings).database_url.get_secret_value()
    return f"sqlite+aiosqlite:///{tmp_path}/metadata.db" if request.param == "sqlite" else None


@pytest.fixture
async def store(url: str | None) -> AsyncIterator[MetadataStore]:
    if url is None:
        yield MemoryMetadataStore()
        return
    await upgrade_schema(CommonSettings.model_validate({"database_url": url}))
    found = SqlMetadataStore(Database(parse_url(url), pool_size=4, timeout_seconds=20))
    yield found
    await found.close()


def row(generation: int, state: RowState = RowState.INDEXED) -> RowWrite:
    return RowWrite(ImageRow(REF, state, generation, generation, etag=str(generation)), generation - 1)


async def test_patches_are_merged_and_survive_overwrites(store: MetadataStore) -> None:
    await store.write([row(1)])
    assert await store.own_metadata([REF.object_id]) == {}
    await store.patch_own_metadata(REF.object_id, {"title": "日本 😀", "where": {"city": "x", "zip": 1}, "tags": ["a"]})
    await store.write([row(2)])
    whole = await store.patch_own_metadata(REF.object_id, {"where": {"zip": None}, "tags": ["b"]})
    assert whole == {"title": "日本 😀", "where": {"city": "x"}, "tags": ["b"]}
    assert await store.own_metadata([REF.object_id, ObjectRef("images", "b").object_id]) == {REF.object_id: whole}


async def test_patches_at_once_are_all_there(store: MetadataStore) -> None:
    await asyncio.gather(*(store.patch_own_metadata(REF.object_id, {f"n{number}": number}) for number in range(8)))
    assert (await store.own_metadata([REF.object_id]))[REF.object_id] == {f"n{number}": number for number in range(8)}


async def test_more_than_is_allowed_changes_nothing(store: MetadataStore) -> None:
    await store.patch_own_metadata(REF.object_id, {"a": 1})
    deep: object = 1
    for _ in range(5):
        deep = [deep]
    for patch in ({"b": "x" * LARGEST_METADATA_BYTES}, {"b": deep}, {"": 1}, {"x" * 65: 1}, {"a\nb": 1}):
        with pytest.raises(ValueError, match="metadata"):
            await store.patch_own_metadata(REF.object_id, patch)
    assert (await store.own_metadata([REF.object_id]))[REF.object_id] == {"a": 1}


async def test_it_goes_when_the_deleted_row_is_purged(store: MetadataStore) -> None:
    await store.write([row(1, RowState.DELETED)])
    await store.patch_own_metadata(REF.object_id, {"a": 1})
    assert await store.purge_deleted(before_us=2**62) == 1
    assert await store.own_metadata([REF.object_id]) == {}
