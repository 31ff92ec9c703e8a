"""Weights from a bucket: brought once, whole, checked, and by nobody else's hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from infra import object_store
from infra.errors import ConfigurationError, StoreUnavailable
from infra.object_store.memory import MemoryObjectStore, Operation
from infra.settings import CommonSettings, ProcessorSettings
from processors.embedding.bucket_weights import bring_from_bucket
from processors.embedding.choice import chosen
from processors.embedding.weights import WeightFolders, obtain
from schemas.identity import ObjectRef

CONTENT = bytes(range(256)) * 1000
REF = ObjectRef("weights", "runs/7/model.pth")


def settings_for(tmp_path: Path, content: bytes = CONTENT) -> ProcessorSettings:
    return ProcessorSettings(
        model="own",
        own_weights="s3://weights/runs/7/model.pth",
        weights_sha256=hashlib.sha256(content).hexdigest(),
        cache_dir=tmp_path,
    )


@pytest.fixture
async def store(monkeypatch: pytest.MonkeyPatch) -> MemoryObjectStore:
    store = MemoryObjectStore()
    await store.ensure_bucket("weights")

    async def connect(settings: CommonSettings) -> MemoryObjectStore:
        return store

    monkeypatch.setattr(object_store, "connect", connect)
    return store


async def test_it_is_brought_once_told_about_and_checked(tmp_path: Path, store: MemoryObjectStore) -> None:
    await store.put(REF, CONTENT)
    settings = settings_for(tmp_path)
    said: list[str] = []
    await bring_from_bucket(chosen(settings), settings, said.append)
    assert said[0] == "downloading s3://weights/runs/7/model.pth" and len(said) > 1
    path = obtain(chosen(settings), WeightFolders.from_settings(settings), print)
    assert path.read_bytes() == CONTENT and [entry.name for entry in path.parent.iterdir()] == [path.name]
    await store.delete(REF)
    await bring_from_bucket(chosen(settings), settings, print)


async def test_a_wrong_file_is_not_kept(tmp_path: Path, store: MemoryObjectStore) -> None:
    await store.put(REF, CONTENT[:-1])
    settings = settings_for(tmp_path)
    with pytest.raises(ConfigurationError, match="not the expected file") as caught:
        await bring_from_bucket(chosen(settings), settings, print)
    assert f"{settings.weights_sha256[:8]}-model.pth" in str(caught.value) and "by hand" in str(caught.value)
    assert list((tmp_path / "weights").iterdir()) == []


@pytest.mark.parametrize("fault", [None, StoreUnavailable("the object store", "connection refused")])
async def test_a_store_that_does_not_give_it(tmp_path: Path, store: MemoryObjectStore, fault: Exception | None) -> None:
    async def fail(operation: Operation, bucket: str, key: str | None) -> None:
        if fault is not None:
            raise fault

    store.before_call = fail
    settings = settings_for(tmp_path)
    with pytest.raises(ConfigurationError, match=r"s3://weights/runs/7/model\.pth cannot be read"):
        await bring_from_bucket(chosen(settings), settings, print)
    assert list((tmp_path / "weights").iterdir()) == []


async def test_weights_from_elsewhere_ask_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "connect", None)
    settings = ProcessorSettings(cache_dir=tmp_path)
    await bring_from_bucket(chosen(settings), settings, print)
