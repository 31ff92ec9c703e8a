"""tune-index on a real Milvus: what it measures is true, its copy is gone afterwards, and the collection is as it was."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus import AsyncMilvusClient  # type: ignore[import-untyped]  # it has no types

from infra import metadata_store, vector_store
from infra.metadata_store import upgrade_schema
from infra.metadata_store.interface import ModelRow
from infra.settings import ENV_PREFIX, CommonSettings
from infra.vector_store import VectorStore
from infra.vector_store.tuning import SCRATCH, Scratch, remove_left_over, scratch_collection
from query_service.index_tuning import trials
from schemas.identity import ModelFingerprint, ObjectRef, content_hash_of
from schemas.tables import ModelState
from schemas.vectors import VectorRow, collection_name
from tests.conftest import FreshSettings, Servers

ROWS, DIMENSION, QUERIES = 2000, 64, 100
FINGERPRINT = ModelFingerprint("7" * 64)


@pytest.fixture(scope="module")
def settings(module_settings: FreshSettings) -> CommonSettings:
    return module_settings(CommonSettings)


@pytest.fixture(scope="module")
def collection(settings: CommonSettings) -> str:
    return collection_name(FINGERPRINT, settings.milvus_collection_prefix)


@pytest.fixture(scope="module")
async def store(settings: CommonSettings, collection: str) -> AsyncIterator[VectorStore]:
    store = await vector_store.connect(settings)
    await store.create_collection(collection, dimension=DIMENSION)
    made = np.random.default_rng(5).standard_normal((ROWS, DIMENSION)).astype(np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    refs = [ObjectRef("b", f"{number}.jpg") for number in range(ROWS)]
    await store.upsert(
        collection,
        [
            VectorRow(ref.object_id, made[number], ref, content_hash_of(ref.key.encode()), 0, 1, 1, 1, "jpeg")
            for number, ref in enumerate(refs)
        ],
    )
    yield store
    await store.drop_collection(collection)
    await store.close()


def no_progress(description: str, total: int) -> Callable[[int], None]:
    return lambda steps: None


async def scratch_names(settings: CommonSettings) -> list[str]:
    client = AsyncMilvusClient(settings.milvus_uri, token=settings.milvus_token.get_secret_value(), dedicated=True)
    try:
        return [
            name for name in await client.list_collections() if name.startswith(settings.milvus_collection_prefix + SCRATCH)
        ]
    finally:
        await client.close()


async def content(store: VectorStore, collection: str) -> str:
    """A digest of all rows with their vectors."""
    entries = await store.page(collection, limit=ROWS + 1)
    found = await store.fetch(collection, [entry.object_id for entry in entries], strong=True)
    digest = hashlib.sha256(str(len(entries)).encode())
    for entry in entries:
        digest.update(entry.object_id + entry.content_hash + found[entry.object_id].vector.tobytes())
    return digest.hexdigest()


async def tuned(settings: CommonSettings, store: VectorStore, collection: str) -> trials.Tuning:
    return await trials.tune(settings, store, collection, rows=ROWS, queries=QUERIES, goal=0.99, progress=no_progress)


async def test_exact_search_finds_all_each_index_some_and_the_copy_is_gone(
    settings: CommonSettings, store: VectorStore, collection: str
) -> None:
    before = await content(store, collection)
    tuning = await tuned(settings, store, collection)
    assert tuning.sample.whole and tuning.sample.rows == ROWS
    by_kind: dict[str, list[trials.Trial]] = {}
    for trial in tuning.trials:
        by_kind.setdefault(trial.index.kind, []).append(trial)
    assert set(by_kind) == {"FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8"}
    assert [trial.recall for trial in by_kind["FLAT"]] == [1.0]
    # Random directions are the hardest there is: what looks into few lists misses some, and more effort finds more.
    few, *_, many = by_kind["IVF_FLAT"][: len(by_kind["IVF_FLAT"]) // 2]
    assert 0 < few.recall < many.recall
    assert all(0 < trial.p50_ms <= trial.p99_ms and trial.memory_bytes > 0 for trial in tuning.trials)
    assert tuning.recommended is not None and tuning.recommended.recall >= 0.99
    assert await scratch_names(settings) == []
    assert await content(store, collection) == before


async def test_after_an_error_the_copy_is_gone(
    settings: CommonSettings, store: VectorStore, collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    async def fail(scratch: Scratch, *_: object) -> list[int]:
        seen.append(await scratch_names(settings))
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Scratch, "search", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        await tuned(settings, store, collection)
    assert [len(names) for names in seen] == [1]
    assert await scratch_names(settings) == []


async def test_what_a_killed_run_left_behind_can_be_removed(settings: CommonSettings) -> None:
    async with scratch_collection(settings) as scratch:
        await scratch.fill(np.eye(DIMENSION, dtype=np.float32), lambda _: None)
        assert await scratch_names(settings) == [scratch.name]
        assert await remove_left_over(settings) == [scratch.name]
        assert await scratch_names(settings) == []
    assert await remove_left_over(settings) == []


@pytest.mark.parametrize("kind", ["FLAT", "IVF_FLAT", "IVF_SQ8"])
async def test_a_collection_can_be_made_with_each_index(servers: Servers, kind: str) -> None:
    name = f"t{secrets.token_hex(4)}_of_an_index"
    chosen = servers.settings.model_copy(update={"milvus_index": kind, "milvus_index_lists": 4})
    store = await vector_store.connect(chosen)
    client = AsyncMilvusClient(chosen.milvus_uri, token=chosen.milvus_token.get_secret_value(), dedicated=True)
    try:
        await store.create_collection(name, dimension=DIMENSION)
        assert (await client.describe_index(name, "vector"))["index_type"] == kind
        ref = ObjectRef("b", "a.jpg")
        vector = np.eye(1, DIMENSION, dtype=np.float32)[0]
        await store.upsert(name, [VectorRow(ref.object_id, vector, ref, content_hash_of(b"x"), 0, 1, 1, 1, "jpeg")])
        assert [hit.object_id for hit in await store.search(name, vector, limit=10, strong=True)] == [ref.object_id]
    finally:
        await store.drop_collection(name)
        await client.close()
        await store.close()


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture
async def environment(settings: CommonSettings, store: VectorStore, collection: str, servers: Servers) -> dict[str, str]:
    """What the command is told by: a deployment with this collection as that of its model."""
    await upgrade_schema(settings)
    metadata = await metadata_store.connect(settings)
    await metadata.add_model(
        ModelRow(FINGERPRINT, "some", collection, DIMENSION, "openvino", "fp32", {}, ModelState.ACTIVE, created_at_us=1)
    )
    await metadata.close()
    own = {
        "milvus_uri": settings.milvus_uri,
        "milvus_token": settings.milvus_token.get_secret_value(),
        "milvus_collection_prefix": settings.milvus_collection_prefix,
        "database_url": settings.database_url.get_secret_value(),
    }
    return {**os.environ, **{f"{ENV_PREFIX}{name.upper()}": value for name, value in own.items()}}


async def started(environment: dict[str, str], folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("image-search")),
        "--state-dir",
        str(folder),
        "tune-index",
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_command_prints_a_document_with_the_recommendation(
    environment: dict[str, str], settings: CommonSettings, tmp_path: Path
) -> None:
    process = await started(environment, tmp_path, "--json", "--queries", "20", "--recall", "0.9")
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    found: dict[str, Any] = json.loads(output)
    assert found["rows"] == ROWS and found["recommended"]["recall_at_10"] >= 0.9
    assert found["recommended"]["settings"]["IMAGE_SEARCH_MILVUS_INDEX"] == found["recommended"]["index"]
    assert await scratch_names(settings) == []


async def test_ctrl_c_removes_the_copy(environment: dict[str, str], settings: CommonSettings, tmp_path: Path) -> None:
    process = await started(environment, tmp_path, "--queries", "900")
    async with asyncio.timeout(120):
        while not await scratch_names(settings):
            assert process.returncode is None, "it ended before it could be interrupted"
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert process.returncode not in (0, None), errors.decode()
    assert await scratch_names(settings) == []
