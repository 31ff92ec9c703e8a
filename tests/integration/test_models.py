"""The models themselves: converted in a process of their own, OpenVINO held to torch, and both to the golden vectors."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings
from processors.decode import decode
from processors.embedding import check_golden, golden_check, open_embedder, prepare_model
from processors.embedding.catalog import CATALOG, ModelDescription, Weights, fingerprint
from processors.embedding.embedder import Embedder, Pixels, Vectors
from processors.embedding.golden_check import GOLDEN_COSINE, GoldenVectors, golden_picture, golden_vectors
from processors.embedding.model_cache import ensure_converted, find_converted
from processors.embedding.model_thread import PICTURES_AT_ONCE
from tests.pictures import edited_copy, jpeg

LITE0 = CATALOG["efficientnet_lite0"]
FP32_COSINE = 0.9999
BF16_COSINE = 0.999
INT8_COSINE = 0.99
SAME_PLACE = 1 - 1e-6
"""Cosine of one picture alone to the same picture in a batch: kernels differ by batch size, in the last bits only."""


def silent(_: str) -> None:
    return


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pictures() -> Pixels:
    rules = LITE0.decode_rules(ProcessorSettings())
    drawn = np.stack([decode(jpeg(seed), rules).pixels for seed in range(10)])
    plain = np.stack([np.full((*LITE0.input_size, 3), value, dtype=np.uint8) for value in (0, 127, 255)])
    noise = np.random.default_rng(3).integers(0, 256, (4, *LITE0.input_size, 3), dtype=np.uint8)
    return np.concatenate([drawn, plain, noise])


@pytest.fixture(scope="module")
def random_resnet50(cache: Path) -> ModelDescription:
    """resnet50's row, on a file of the right form whose weights nobody trained: the real ones need a network."""
    import torch
    import torchvision  # type: ignore[import-untyped]  # the package brings no types

    torch.manual_seed(17)
    path = cache / "weights" / "random-resnet50.pth"
    path.parent.mkdir(exist_ok=True)
    torch.save(torchvision.models.resnet50().state_dict(), path)
    row = CATALOG["resnet50"]
    weights = Weights(
        file_name=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        source=row.weights.source,
        licence="none",
    )
    return replace(row, name="random-resnet50", weights=weights)


@pytest.fixture(scope="module", params=["efficientnet_lite0", "random-resnet50"])
def row(request: pytest.FixtureRequest) -> ModelDescription:
    if request.param == "efficientnet_lite0":
        return LITE0
    described = request.getfixturevalue("random_resnet50")
    assert isinstance(described, ModelDescription)
    return described


@pytest.fixture(scope="module")
async def openvino(row: ModelDescription, cache: Path) -> AsyncIterator[Embedder]:
    embedder = await open_embedder(row, ProcessorSettings(cache_dir=cache))
    yield embedder
    await embedder.close()


@pytest.fixture(scope="module")
async def torch_reference(row: ModelDescription, cache: Path) -> AsyncIterator[Embedder]:
    embedder = await open_embedder(row, ProcessorSettings(cache_dir=cache, model_backend="torch"))
    yield embedder
    await embedder.close()


def least_cosine(first: Vectors, second: Vectors) -> float:
    return float(np.sum(first.astype(np.float64) * second, axis=1).min())


async def test_openvino_computes_what_torch_computes(openvino: Embedder, torch_reference: Embedder, pictures: Pixels) -> None:
    reference = await torch_reference.embed(pictures)
    vectors = await openvino.embed(pictures)
    assert vectors.dtype == np.float32 and vectors.shape == (len(pictures), openvino.dimension)
    assert least_cosine(vectors, reference) >= FP32_COSINE
    assert np.abs(vectors - reference).max() < 1e-3


async def test_vectors_are_unit_vectors_of_the_rows_dimension(
    openvino: Embedder, row: ModelDescription, pictures: Pixels
) -> None:
    vectors = await openvino.embed(pictures)
    assert vectors.shape[1] == row.dimension == openvino.dimension
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert openvino.fingerprint == fingerprint(row, "fp32") and openvino.input_size == row.input_size


async def test_alone_and_in_a_batch_a_picture_has_the_same_vector(
    openvino: Embedder, torch_reference: Embedder, pictures: Pixels
) -> None:
    assert len(pictures) > 2 * PICTURES_AT_ONCE, "or the batch is not split"
    for embedder in (openvino, torch_reference):
        together = await embedder.embed(pictures)
        for place in (0, PICTURES_AT_ONCE, len(pictures) - 1):
            alone = await embedder.embed(pictures[place : place + 1])
            assert least_cosine(together[place : place + 1], alone) >= SAME_PLACE


async def test_no_pictures_no_vectors(openvino: Embedder, pictures: Pixels) -> None:
    assert (await openvino.embed(pictures[:0])).shape == (0, openvino.dimension)


async def test_calls_at_once_do_not_mix(openvino: Embedder, pictures: Pixels) -> None:
    expected = await openvino.embed(pictures)
    starts = range(0, len(pictures) - 3, 3)
    answers = await asyncio.gather(*(openvino.embed(pictures[start : start + 3]) for start in starts))
    for start, answer in zip(starts, answers, strict=True):
        assert least_cosine(answer, expected[start : start + 3]) >= SAME_PLACE


async def test_pixels_of_the_wrong_form(openvino: Embedder, pictures: Pixels) -> None:
    for wrong in (pictures[:, :100], pictures[0], pictures.astype(np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            await openvino.embed(wrong)  # type: ignore[arg-type]  # wrong on purpose


async def test_a_read_only_picture_is_taken_as_it_comes(openvino: Embedder) -> None:
    pixels = decode(jpeg(1), LITE0.decode_rules(ProcessorSettings())).pixels[None]
    assert not pixels.flags.writeable
    assert (await openvino.embed(pixels)).shape == (1, openvino.dimension)


async def test_an_edited_copy_is_nearer_than_any_other_picture(cache: Path) -> None:
    embedder = await open_embedder(LITE0, ProcessorSettings(cache_dir=cache))
    try:
        rules = LITE0.decode_rules(ProcessorSettings())
        originals = [jpeg(seed) for seed in range(12)]
        vectors = await embedder.embed(np.stack([decode(data, rules).pixels for data in originals]))
        copies = await embedder.embed(np.stack([decode(edited_copy(data), rules).pixels for data in originals]))
    finally:
        await embedder.close()
    assert np.array_equal(np.argmax(copies @ vectors.T, axis=1), np.arange(12))


@pytest.mark.parametrize("backend", ["openvino", "torch"])
async def test_golden_vectors(cache: Path, backend: str) -> None:
    embedder = await open_embedder(LITE0, ProcessorSettings.model_validate({"cache_dir": cache, "model_backend": backend}))
    try:
        least = await check_golden(embedder, LITE0)
    finally:
        await embedder.close()
    assert least is not None and least >= GOLDEN_COSINE["fp32"]


class Stand:
    """An embedder that answers what it is given."""

    def __init__(self, label: str, answer: Callable[[Pixels], Vectors]) -> None:
        self.fingerprint = label
        self.dimension = LITE0.dimension
        self.input_size = LITE0.input_size
        self._answer = answer

    async def embed(self, pixels: Pixels) -> Vectors:
        return self._answer(pixels)

    async def close(self) -> None:
        return


def off_by(angle: float) -> Callable[[Pixels], Vectors]:
    golden = golden_vectors(LITE0)
    assert golden is not None
    vectors = np.array(list(golden.vectors.values()), dtype=np.float32)
    other = np.roll(vectors, 1, axis=1)
    other -= np.sum(other * vectors, axis=1, keepdims=True) * vectors
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    return lambda _: (np.cos(angle) * vectors + np.sin(angle) * other).astype(np.float32)


async def test_a_host_that_computes_something_else_does_not_start() -> None:
    label = fingerprint(LITE0, "fp32")
    assert await check_golden(Stand(label, off_by(0.001)), LITE0) is not None  # type: ignore[arg-type]  # label is a str here
    for wrong in (off_by(0.05), lambda pixels: np.full((len(pixels), LITE0.dimension), np.nan, dtype=np.float32)):
        with pytest.raises(ConfigurationError, match="computes other vectors"):
            await check_golden(Stand(label, wrong), LITE0)  # type: ignore[arg-type]  # label is a str here
    with pytest.raises(ConfigurationError, match="another fingerprint"):
        await check_golden(Stand("0" * 64, off_by(0)), LITE0)  # type: ignore[arg-type]  # label is a str here


async def test_a_model_without_golden_vectors_is_not_compared(random_resnet50: ModelDescription) -> None:
    assert await check_golden(Stand("0" * 64, off_by(0)), random_resnet50) is None  # type: ignore[arg-type]  # a str here


def test_the_golden_files_are_whole() -> None:
    golden = golden_vectors(LITE0)
    assert isinstance(golden, GoldenVectors)
    rules = LITE0.decode_rules(ProcessorSettings())
    for name in golden.vectors:
        assert decode(golden_picture(name), rules).pixels.std() > 20
    assert golden_check.GOLDEN_COSINE == {"fp32": FP32_COSINE, "bf16": BF16_COSINE, "int8": INT8_COSINE}


async def test_a_model_is_converted_once_and_again_when_it_is_damaged(tmp_path: Path) -> None:
    said: list[str] = []
    settings = ProcessorSettings(cache_dir=tmp_path)
    first, second = await asyncio.gather(prepare_model(settings, said.append), prepare_model(settings, said.append))
    assert first == second and first.path.is_file() and first.fingerprint == fingerprint(LITE0, "fp32")
    assert sum("is converted" in line for line in said) == 1
    assert {path.name for path in (tmp_path / "models").iterdir()} == {first.fingerprint, f".{first.fingerprint}.lock"}

    good = {path: path.read_bytes() for path in first.path.parent.iterdir()}
    said.clear()
    assert await prepare_model(settings, said.append) == first and said == []

    binary = first.path.with_suffix(".bin")
    binary.write_bytes(good[binary][:1000] + b"damage" + good[binary][1006:])
    assert find_converted(tmp_path / "models", first.fingerprint) is None
    await prepare_model(settings, said.append)
    assert binary.read_bytes() == good[binary]


async def test_a_file_that_holds_other_weights_is_refused(random_resnet50: ModelDescription, cache: Path) -> None:
    mistaken = replace(LITE0, name="mistaken", weights=random_resnet50.weights)
    with pytest.raises(ConfigurationError, match="does not hold the weights of efficientnet_lite0"):
        await ensure_converted(mistaken, ProcessorSettings(cache_dir=cache), silent)


async def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    import pickle

    witness = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.system, (f"touch {witness}",)

    path = tmp_path / "weights" / "hostile.pth"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    weights = replace(LITE0.weights, file_name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    hostile = replace(LITE0, name="hostile", weights=weights)
    for backend in ("openvino", "torch"):
        settings = ProcessorSettings.model_validate({"cache_dir": tmp_path, "model_backend": backend})
        with pytest.raises(ConfigurationError, match="does not hold the weights"):
            await open_embedder(hostile, settings)
    assert not witness.exists()


SERVING = """
import asyncio, sys
from pathlib import Path
from infra.settings import ProcessorSettings
from processors.embedding import check_golden, open_embedder, prepare_model
import numpy as np, processors.decode, processors.decode_pool

async def main():
    settings = ProcessorSettings(cache_dir=Path(sys.argv[1]))
    prepared = await prepare_model(settings, print)
    embedder = await open_embedder(prepared.description, settings)
    assert await check_golden(embedder, prepared.description)
    await embedder.close()
    heavy = sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "torchvision", "efficientnet_lite_pytorch"))
    assert not heavy, heavy

asyncio.run(main())
"""


def test_a_serving_process_never_imports_torch_and_nothing_calls_home(tmp_path: Path) -> None:
    """From an empty cache, so that the conversion is part of it: OpenVINO's converter leaves a trace when it reports."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("CI", None)
    command = [sys.executable, "-W", "error", "-c", SERVING, str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
