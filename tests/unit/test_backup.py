"""A backup comes back as it was taken, or is refused; on a database file and the twin of the vector store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from infra import backup, metadata_store, vector_store
from infra.backup.manifest import MANIFEST_FILE, Manifest
from infra.backup.restore import GENERATION_STEP
from infra.errors import ConfigurationError, StoreUnavailable
from infra.metadata_store import upgrade_schema
from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow, RowWrite
from infra.settings import CommonSettings
from infra.vector_store.memory import MemoryVectorStore
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.tables import ModelState, RowState
from schemas.vectors import VectorRow

DIMENSION = 4
MODEL = ModelFingerprint("a" * 64)
KEYS = ["a.jpg", "A.jpg", "a.jpg ", "ä/日本.png", "with'quote\\.jpg", *(f"{number:02}.jpg" for number in range(7))]


@dataclass(frozen=True)
class Stores:
    settings: CommonSettings
    metadata: MetadataStore
    vectors: MemoryVectorStore
    collection: str

    async def rows(self) -> dict[str, ImageRow]:
        return {row.ref.key: row for row in await self.metadata.list_rows()}

    async def held(self) -> dict[ObjectId, VectorRow]:
        return {
            row.object_id: row
            for row in self.vectors._collections[self.collection].rows.values()  # the twin keeps what it was given
        }


@pytest.fixture(autouse=True)
def pages_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.backup.take.PAGE_ROWS", 3)
    monkeypatch.setattr("infra.backup.restore.PAGE_ROWS", 3)


@pytest.fixture
async def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stores]:
    async with made(tmp_path, "full", monkeypatch) as stores:
        for number, key in enumerate(KEYS):
            await index(stores, key, generation=1 + number % 3)
        yield stores


@asynccontextmanager
async def made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, model: ModelFingerprint = MODEL
) -> AsyncIterator[Stores]:
    settings = CommonSettings.model_validate({"database_url": f"sqlite+aiosqlite:///{tmp_path / name}.db"})
    await upgrade_schema(settings)
    metadata, vectors, collection = await metadata_store.connect(settings), MemoryVectorStore(), f"{name}_images"
    await vectors.create_collection(collection, dimension=DIMENSION)
    await metadata.add_model(
        ModelRow(model, "a model", collection, DIMENSION, "openvino", "fp32", {}, ModelState.ACTIVE, created_at_us=1)
    )
    use(vectors, monkeypatch)
    yield Stores(settings, metadata, vectors, collection)
    await metadata.close()


def use(vectors: MemoryVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(_settings: CommonSettings) -> MemoryVectorStore:
        return vectors

    monkeypatch.setattr(vector_store, "connect", connect)


async def index(stores: Stores, key: str, *, generation: int = 1) -> None:
    ref, content = ObjectRef("images", key), content_of(key)
    for step in range(generation):
        row = ImageRow(
            ref,
            RowState.INDEXED,
            generation=step + 1,
            published_generation=step + 1,
            content_hash=content,
            md5=bytes(16),
            etag="e",
            put_time_us=1_700_000_000_000_000,
            size=10,
            format="jpeg",
            width=3,
            height=2,
        )
        assert not await stores.metadata.write([RowWrite(row, step, frozenset({MODEL}))])
    vector = np.random.default_rng(len(key)).random(DIMENSION).astype(np.float32)
    await stores.vectors.upsert(
        stores.collection, [VectorRow(ref.object_id, vector, ref, content, 1_700_000_000_000_000, 10, 3, 2, "jpeg")]
    )


def content_of(key: str) -> ContentHash:
    return ContentHash(hashlib.sha256(key.encode()).digest())


def silent(_what: str, _done: int, _total: int) -> None: ...


async def test_a_backup_comes_back_as_it_was(full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ObjectRef("images", "gone.jpg")
    await full.metadata.write([RowWrite(ImageRow(gone, RowState.DELETED, 1, 0), 0)])
    manifest = await backup.take_backup(full.settings, tmp_path / "backup", silent)
    assert manifest.tables["images"].rows == len(KEYS) + 1
    assert manifest.tables["image_models"].rows == manifest.collections[MODEL].vectors == len(KEYS)
    async with made(tmp_path, "empty", monkeypatch) as other:
        assert await backup.restore_backup(other.settings, tmp_path / "backup", silent) == backup.Restored(
            len(KEYS) + 1, len(KEYS), 0
        )
        later = {
            key: replace(
                row,
                generation=row.generation + GENERATION_STEP,
                published_generation=row.published_generation + GENERATION_STEP,
            )
            for key, row in (await full.rows()).items()
        }
        assert await other.rows() == later
        ids = [row.object_id for row in later.values()]
        assert await other.metadata.models_of(ids) == await full.metadata.models_of(ids)
        before, after = await full.held(), await other.held()
        assert before.keys() == after.keys()
        for object_id, row in before.items():
            assert replace(after[object_id], vector=row.vector) == row
            assert np.array_equal(after[object_id].vector, row.vector)


async def test_a_vector_of_other_bytes_than_its_row_stays_behind(
    full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [stored] = (await full.vectors.fetch(full.collection, [ObjectRef("images", "a.jpg").object_id])).values()
    other_bytes = VectorRow(
        stored.object_id, stored.vector, ObjectRef("images", "a.jpg"), content_of("other"), 0, 1, 1, 1, "png"
    )
    await full.vectors.upsert(full.collection, [other_bytes])
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    async with made(tmp_path, "empty", monkeypatch) as other:
        restored = await backup.restore_backup(other.settings, tmp_path / "backup", silent)
        assert (restored.vectors, restored.passed_over) == (len(KEYS) - 1, 1)
        assert stored.object_id not in await other.held()


async def test_vectors_of_another_model_are_not_said_to_be_there(
    full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_model = ModelFingerprint("b" * 64)
    row = (await full.rows())["a.jpg"]
    written = RowWrite(replace(row, generation=row.generation + 1), row.generation, frozenset({MODEL, other_model}))
    assert not await full.metadata.write([written])
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    async with made(tmp_path, "empty", monkeypatch) as other:
        await backup.restore_backup(other.settings, tmp_path / "backup", silent)
        models = await other.metadata.models_of([row.object_id])
        assert models == {row.object_id: {MODEL: row.content_hash}}


async def test_buckets_that_were_added_are_followed_again(
    full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await full.metadata.add_bucket("holiday")
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    async with made(tmp_path, "empty", monkeypatch) as other:
        await backup.restore_backup(other.settings, tmp_path / "backup", silent)
        assert await other.metadata.added_buckets() == ["holiday"]


async def test_an_interrupted_restore_goes_on_and_what_is_there_stays(
    full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    async with made(tmp_path, "half", monkeypatch) as other:
        await index(other, "a.jpg", generation=2)
        with pytest.raises(ConfigurationError, match=r"not empty.*--continue"):
            await backup.restore_backup(other.settings, tmp_path / "backup", silent)
        await backup.restore_backup(other.settings, tmp_path / "backup", silent, go_on=True)
        rows = await other.rows()
        assert rows.keys() == set(KEYS)
        assert rows["a.jpg"].generation == 2
        assert len(await other.held()) == len(KEYS)


@pytest.mark.parametrize("name", ["images.jsonl.gz", f"{MODEL[:16]}.vectors", MANIFEST_FILE])
@pytest.mark.parametrize("how", ["cut", "changed", "removed"])
async def test_a_damaged_backup_is_refused(
    full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    file = tmp_path / "backup" / name
    data = file.read_bytes()
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(data[:-3] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    async with made(tmp_path, "empty", monkeypatch) as other:
        with pytest.raises(ConfigurationError, match=r"damaged|missing or wrong"):
            await backup.restore_backup(other.settings, tmp_path / "backup", silent)
        assert not await other.rows()


async def test_another_model_or_schema_is_refused(full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    async with made(tmp_path, "other", monkeypatch, model=ModelFingerprint("b" * 64)) as other:
        with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_MODEL"):
            await backup.restore_backup(other.settings, tmp_path / "backup", silent)
    file = tmp_path / "backup" / MANIFEST_FILE
    manifest = Manifest.model_validate_json(file.read_bytes())
    file.write_text(json.dumps(json.loads(manifest.model_dump_json()) | {"schema_version": "9999"}))
    async with made(tmp_path, "empty", monkeypatch) as other:
        with pytest.raises(ConfigurationError, match="schema version 9999"):
            await backup.restore_backup(other.settings, tmp_path / "backup", silent)


async def test_what_is_not_whole_never_has_the_backups_name(
    full: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_name: str) -> int:
        raise StoreUnavailable("vector store", "away")

    monkeypatch.setattr(full.vectors, "count", away)
    with pytest.raises(StoreUnavailable):
        await backup.take_backup(full.settings, tmp_path / "backup", silent)
    assert names_in(tmp_path) == ["full.db"]
    (tmp_path / "backup").mkdir()
    with pytest.raises(ConfigurationError, match="name a new folder"):
        await backup.take_backup(full.settings, tmp_path / "backup", silent)


async def test_only_its_owner_may_read_a_backup(full: Stores, tmp_path: Path) -> None:
    await backup.take_backup(full.settings, tmp_path / "backup", silent)
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "backup").iterdir()} == {0o600}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm")))
