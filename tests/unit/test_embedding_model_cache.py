"""Converted models on disk: used only when whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from processors.embedding.catalog import CATALOG, fingerprint
from processors.embedding.model_cache import MANIFEST_FILE, MODEL_FILE, Manifest, ensure_converted, find_converted, model_folder

ROW = CATALOG["efficientnet_lite0"]
LABEL = fingerprint(ROW, "fp32")


def put_model(models: Path) -> Path:
    folder = model_folder(models, LABEL)
    folder.mkdir(parents=True)
    files = {MODEL_FILE: b"<net/>", "model.bin": b"\0" * 64}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = Manifest(fingerprint=LABEL, model=ROW.name, precision="fp32", openvino="1", torch="2", files=digests)
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder


def test_a_whole_model_is_found(tmp_path: Path) -> None:
    folder = put_model(tmp_path)
    assert find_converted(tmp_path, LABEL) == folder / MODEL_FILE


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_converted(tmp_path, LABEL) is None


@pytest.mark.parametrize("name", [MODEL_FILE, "model.bin", MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["changed", "gone", "empty"])
def test_a_damaged_model_is_not_used(tmp_path: Path, name: str, damage: str) -> None:
    file = put_model(tmp_path) / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-1] + b"?")
    assert find_converted(tmp_path, LABEL) is None


def test_a_model_of_another_fingerprint_is_not_used(tmp_path: Path) -> None:
    folder = put_model(tmp_path)
    manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_text(manifest.model_copy(update={"fingerprint": "0" * 64}).model_dump_json())
    assert find_converted(tmp_path, LABEL) is None


async def test_a_model_that_was_converted_before_is_used_without_a_word(tmp_path: Path) -> None:
    folder = put_model(tmp_path / "models")
    said: list[str] = []
    assert await ensure_converted(ROW, ProcessorSettings(cache_dir=tmp_path), said.append) == folder / MODEL_FILE
    assert said == []
