"""int8: calibrated on pictures that are part of the fingerprint, held to fp32, the same on every host that has the pictures."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from infra import metadata_store, object_store, vector_store
from infra.errors import ConfigurationError
from infra.metadata_store.memory import MemoryMetadataStore
from infra.object_store.memory import MemoryObjectStore
from infra.settings import ProcessorSettings
from infra.vector_store.memory import MemoryVectorStore
from processors.commands import upgrade_step
from processors.decode import decode
from processors.embedding import check_golden, host, open_embedder, prepare_model
from processors.embedding.active_model import active_model, settled
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.embedder import Vectors
from processors.embedding.fastest import decided
from schemas.identity import ObjectRef
from tests.pictures import edited_copy, jpeg

PICTURES = 40


@pytest.fixture(autouse=True)
def int8_host() -> None:
    try:
        host.check_precision("int8")
    except ConfigurationError:
        pytest.skip("the processor of this host has no VNNI")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for seed in range(PICTURES):
        (folder / ("below" if seed % 2 else ".") / f"{seed}.jpg").write_bytes(jpeg(1000 + seed, (320, 256)))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings_for(cache: Path, precision: str, calibration: Path | None = None) -> ProcessorSettings:
    return ProcessorSettings.model_validate(
        {"cache_dir": cache, "model_precision": precision, "calibration_dir": calibration, "decode_workers": 1}
    )


async def vectors_of(settings: ProcessorSettings, data: list[bytes]) -> Vectors:
    row = chosen(settings)
    embedder = await open_embedder(row, settings)
    try:
        assert await check_golden(embedder, row) is not None
        return await embedder.embed(np.stack([decode(one, row.decode_rules(settings)).pixels for one in data]))
    finally:
        await embedder.close()


async def test_int8_finds_what_fp32_finds_and_is_made_once(cache: Path, pictures: Path) -> None:
    said: list[str] = []
    settings = await decided(settings_for(cache, "int8", pictures), [], said.append)
    prepared = await prepare_model(settings, said.append)
    assert said[0].startswith(f"int8 is calibrated on {PICTURES} pictures of {pictures}, and the ")
    assert prepared.fingerprint == fingerprint(chosen(settings), "int8") != fingerprint(chosen(settings), "fp32")

    originals = [jpeg(seed) for seed in range(24)]
    copies = [edited_copy(data) for data in originals]
    both = {}
    for precision in ("fp32", "int8"):
        own = settings.model_copy(update={"model_precision": precision})
        vectors = await vectors_of(own, originals + copies)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
        found = np.argmax(vectors[24:] @ vectors[:24].T, axis=1)
        assert np.mean(found == np.arange(24)) >= 0.95
        both[precision] = vectors
    cosines = np.sum(both["fp32"] * both["int8"], axis=1)
    assert cosines.min() >= 0.95 and cosines.max() < 0.99999, "or it was not int8"

    # The same pictures are the same set, in whatever order the disk lists them, and nothing is made a second time.
    again = await decided(settings_for(cache, "int8", pictures), [], said.append)
    assert again.calibration_sha256 == settings.calibration_sha256
    said.clear()
    assert await prepare_model(again, said.append) == prepared and said == []


async def test_another_host_makes_the_same_model_from_the_same_file(cache: Path, pictures: Path, tmp_path: Path) -> None:
    settings = await decided(settings_for(cache, "int8", pictures), [], print)
    made = await prepare_model(settings, print)
    elsewhere = settings_for(tmp_path, "int8").model_copy(update={"calibration_sha256": settings.calibration_sha256})
    name = f"{settings.calibration_sha256}.npy"
    with pytest.raises(ConfigurationError, match=f"copy {name} .* into {tmp_path / 'weights'}"):
        await prepare_model(elsewhere, print)

    (tmp_path / "weights").mkdir()
    target = tmp_path / "weights" / name
    target.write_bytes((cache / "weights" / name).read_bytes()[:-1] + b"?")
    with pytest.raises(ConfigurationError, match=f"copy {name}"):
        await prepare_model(elsewhere, print)
    shutil.copy(cache / "weights" / name, target)
    there = await prepare_model(elsewhere, print)
    assert there.fingerprint == made.fingerprint
    assert there.path.with_suffix(".bin").read_bytes() == made.path.with_suffix(".bin").read_bytes()


async def test_a_converted_model_that_was_copied_needs_neither_pictures_nor_nncf(
    cache: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = await decided(settings_for(cache, "int8", pictures), [], print)
    made = await prepare_model(settings, print)
    shutil.copytree(made.path.parent, tmp_path / "models" / made.fingerprint)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    said: list[str] = []
    elsewhere = settings.model_copy(update={"cache_dir": tmp_path})
    assert (await prepare_model(elsewhere, said.append)).fingerprint == made.fingerprint
    assert said == []

    shutil.rmtree(tmp_path / "models")
    with pytest.raises(ConfigurationError, match=r"pip install 'image-search\[training\]'"):
        await prepare_model(elsewhere, print)


async def test_too_few_pictures(cache: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that was named: refused. In a bucket: those that come with the program, and it says so."""
    few = tmp_path / "few"
    few.mkdir()
    for path in [pictures / f"{seed}.jpg" for seed in (0, 2, 4)]:
        shutil.copy(path, few)
    with pytest.raises(ConfigurationError, match="has 3 that can be decoded: IMAGE_SEARCH_CALIBRATION_DIR"):
        await decided(settings_for(cache, "int8", few), [], print)

    store = MemoryObjectStore()
    await store.ensure_bucket("pictures")

    async def connect(_: object) -> MemoryObjectStore:
        return store

    monkeypatch.setattr(object_store, "connect", connect)
    said: list[str] = []
    settings = await decided(settings_for(cache, "int8"), ["pictures"], said.append)
    assert "pictures that come with the program, not on your own: pictures has fewer than 32" in said[0]

    for seed in range(33):
        await store.put(ObjectRef("pictures", f"{seed}.jpg"), jpeg(seed, (100, 80)), "image/jpeg")
    said.clear()
    own = await decided(settings_for(cache, "int8"), ["pictures"], said.append)
    assert own.calibration_sha256 not in ("", settings.calibration_sha256)
    assert said[0].startswith("int8 is calibrated on 33 pictures of pictures, and the ")


async def test_where_int8_does_not_run(cache: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_backend = settings_for(cache, "int8", pictures).model_copy(update={"model_backend": "torch"})
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_MODEL_BACKEND=openvino"):
        await prepare_model(torch_backend, print)
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs\t\t:\n")
    monkeypatch.setattr(host, "PROCESSOR_FACTS", facts)
    with pytest.raises(ConfigurationError, match="no VNNI"):
        await decided(settings_for(cache, "int8", pictures), [], print)
    settings = settings_for(cache, "int8").model_copy(update={"calibration_sha256": "a" * 64})
    with pytest.raises(ConfigurationError, match="no VNNI"):
        await open_embedder(chosen(settings), settings)


async def test_auto_is_settled_once_by_who_makes_the_collection(
    cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata, vectors = MemoryMetadataStore(), MemoryVectorStore()

    async def rows(_: object) -> MemoryMetadataStore:
        return metadata

    async def collections(_: object) -> MemoryVectorStore:
        return vectors

    monkeypatch.setattr(metadata_store, "connect", rows)
    monkeypatch.setattr(vector_store, "connect", collections)
    asked = settings_for(cache, "auto", pictures)
    with pytest.raises(ConfigurationError, match="image-search upgrade"):
        await settled(asked, metadata)

    said: list[str] = []
    await upgrade_step(asked, said.append)
    [row] = await metadata.models()
    table = [line for line in said if "pictures a second" in line]
    assert len(table) == 2 and sum("chosen" in line for line in table) == 1
    [line] = [line for line in table if "chosen" in line]
    assert line.split()[0] == row.precision

    # A host that would choose otherwise, and has no such folder: what is stored is what runs.
    monkeypatch.setattr("processors.embedding.fastest.decided", None)
    settings = await settled(settings_for(cache, "auto"), metadata)
    assert precision_asked(settings) == row.precision
    assert await active_model(metadata, fingerprint(chosen(settings), precision_asked(settings)), row.name) == row
    said.clear()
    await upgrade_step(settings_for(cache, "auto"), said.append)
    assert await metadata.models() == [row]
    assert not any("pictures a second" in line for line in said)
    with pytest.raises(ConfigurationError, match=r"was made with efficientnet_lite0|is calibrated when its collection is made"):
        other = await settled(settings_for(cache, "int8" if row.precision == "fp32" else "fp32"), metadata)
        await active_model(metadata, fingerprint(chosen(other), precision_asked(other)), row.name)
