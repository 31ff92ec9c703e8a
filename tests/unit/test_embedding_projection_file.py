"""The file of a fitted projection: what was written comes back, and nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import ConfigurationError
from processors.embedding.catalog import CATALOG, FittedProjection, LocalFile, ModelDescription, Weights, fingerprint
from processors.embedding.projection_file import (
    FittedMap,
    ProjectionFacts,
    read_any_projection,
    read_projection,
    write_projection,
)

PARENT = CATALOG["efficientnet_lite0"]
FACTS = ProjectionFacts(
    parent=fingerprint(PARENT, "fp32"),
    model=PARENT.name,
    columns=1280,
    dimension=6,
    pictures=100,
    whitening=1.0,
    shrinkage=0.25,
)


def fitted(facts: ProjectionFacts = FACTS) -> FittedMap:
    generator = np.random.default_rng(4)
    mean = generator.standard_normal(facts.columns).astype(np.float32)
    return FittedMap(facts, mean, generator.standard_normal((facts.dimension, facts.columns)).astype(np.float32))


def projected(path: Path, dimension: int = 6, parent: ModelDescription = PARENT) -> ModelDescription:
    file = Weights(file_name=path.name, sha256="ab" * 32, source=LocalFile(str(path)), licence="", form="safetensors")
    return replace(parent, dimension=dimension, projection=FittedProjection(file, parent.unprojected().dimension))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_projection(tmp_path / "p.safetensors", fitted())
    return tmp_path / "p.safetensors"


def test_what_was_written_comes_back(path: Path) -> None:
    found = read_projection(path, projected(path))
    assert found.facts == FACTS
    assert np.array_equal(found.mean, fitted().mean) and np.array_equal(found.matrix, fitted().matrix)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_same_projection_is_the_same_file(path: Path) -> None:
    before = path.read_bytes()
    write_projection(path, fitted())
    assert path.read_bytes() == before


def test_other_readers_of_the_form_can_read_it(path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(path)
    assert np.array_equal(tensors["mean"], fitted().mean) and np.array_equal(tensors["matrix"], fitted().matrix)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_projection(path, fitted(FACTS.model_copy(update={"pictures": 7})))
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == [path.name]


def header_of(data: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        header, numbers = header_of(data)
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + numbers

    return damage


def not_a_number(data: bytes) -> bytes:
    return data[:-4] + np.array([np.nan], dtype="<f4").tobytes()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[:-1],
    "more behind it": lambda data: data + b"\0",
    "a header without end": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"\xff" + data[9:],
    "a number that is none": not_a_number,
    "another form": with_header(lambda header: header["__metadata__"].update(form="image-search/projection/2")),
    "a word more": with_header(lambda header: header["__metadata__"].update(more="1")),
    "a fact less": with_header(lambda header: header["__metadata__"].pop("pictures")),
    "a tensor more": with_header(lambda header: header.update(other=header["mean"])),
    "another shape": with_header(lambda header: header["matrix"].update(shape=[1280, 6])),
    "beyond the end": with_header(lambda header: header["matrix"].update(data_offsets=[5120, 1 << 40])),
    "another size than it says": with_header(lambda header: header["__metadata__"].update(dimension="7")),
    "a giant": with_header(lambda header: header["__metadata__"].update(columns="999999999")),
    "halves": with_header(lambda header: header["mean"].update(dtype="F16")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(path: Path, damage: str) -> None:
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ConfigurationError, match=str(path)):
        read_any_projection(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_any_projection(tmp_path / "p.safetensors")


def test_a_projection_for_other_vectors_is_refused(path: Path) -> None:
    other = replace(PARENT, gem_power=4.0)
    with pytest.raises(ConfigurationError, match="was fitted on vectors of another model"):
        read_projection(path, projected(path, parent=other))


def test_a_dimension_that_is_not_the_files_says_the_right_one(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_PROJECTION_DIMENSION=6"):
        read_projection(path, projected(path, dimension=5))
