"""`image-search put`: which files, under which keys, and what each one is told."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from infra.errors import StoreUnavailable
from infra.object_store.memory import MemoryObjectStore, Operation
from ingest_bridge import upload as uploading
from ingest_bridge.upload import UPLOADS_AT_ONCE, LocalFile, UploadResult, find_files, upload
from schemas.identity import ObjectRef


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.jpg", "sub/ä ö.png", "sub/deeper/c.jpg"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "pictures"


async def put_all(objects: MemoryObjectStore, files: list[LocalFile]) -> dict[str, UploadResult]:
    results: list[UploadResult] = []
    await upload(objects, "images", files, results.append)
    assert len(results) == len(files)
    return {result.file.key: result for result in results}


def test_a_folder_gives_all_its_files_by_their_path_in_it(folder: Path) -> None:
    assert [file.key for file in find_files([folder])] == ["a.jpg", "b.jpg", "sub/ä ö.png", "sub/deeper/c.jpg"]


def test_a_file_keeps_its_name_only(folder: Path) -> None:
    assert [file.key for file in find_files([folder / "sub" / "deeper" / "c.jpg"], "in/")] == ["in/c.jpg"]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "again").symlink_to(folder)
    assert len(list(find_files([folder]))) == 4


async def test_files_become_objects(folder: Path) -> None:
    objects = MemoryObjectStore("images")
    results = await put_all(objects, list(find_files([folder], "in/")))
    assert all(result.error is None for result in results.values())
    stored = await objects.read(ObjectRef("images", "in/sub/ä ö.png"), max_bytes=100)
    assert stored.data == "sub/ä ö.png".encode()
    assert stored.stat.content_type == "image/png"


async def test_one_file_that_fails_does_not_stop_the_others(folder: Path) -> None:
    objects = MemoryObjectStore("images")

    async def refuse_one(operation: Operation, bucket: str, key: str | None) -> None:
        if key == "a.jpg":
            raise StoreUnavailable("object store", "away")

    objects.before_call = refuse_one
    files = [*find_files([folder]), LocalFile(folder / "missing.jpg", "missing.jpg")]
    results = await put_all(objects, files)
    assert {key: result.error for key, result in results.items() if result.error} == {
        "a.jpg": "object store is not available: away",
        "missing.jpg": "No such file or directory",
    }


async def test_a_name_that_is_not_utf8_is_told(folder: Path) -> None:
    name = os.fsdecode(b"bad\xff.jpg")
    (folder / name).write_bytes(b"x")
    results = await put_all(MemoryObjectStore("images"), list(find_files([folder])))
    assert results[name].error == "its name is not UTF-8, and so can be no key"
    assert sum(result.error is None for result in results.values()) == 4


async def test_a_file_that_is_too_large_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "MOST_BYTES", 1024 * 1024)
    (folder / "large.jpg").write_bytes(b"x" * (1024 * 1024 + 1))
    results = await put_all(MemoryObjectStore("images"), list(find_files([folder])))
    assert results["large.jpg"].error == "larger than 1 MiB: put it with an S3 client"


async def test_only_so_many_are_put_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    at_once = most = 0

    async def count(operation: Operation, bucket: str, key: str | None) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        at_once -= 1

    objects = MemoryObjectStore("images")
    objects.before_call = count
    await put_all(objects, [LocalFile(tmp_path / "a", str(number)) for number in range(100)])
    assert 1 < most <= UPLOADS_AT_ONCE
