"""The model by the GPU's way: on the processor here, so that its code runs on every host, and on a GPU where there is one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings
from processors.decode import decode
from processors.embedding import check_golden, golden_check, host, open_embedder
from processors.embedding.catalog import CATALOG, Precision
from processors.embedding.choice import chosen
from processors.embedding.cuda_backend import CudaEmbedder
from processors.embedding.embedder import Pixels
from processors.embedding.golden_check import GOLDEN_COSINE
from processors.embedding.torch_backend import TorchEmbedder
from processors.embedding.weights import WeightFolders, obtain
from tests.benchmarks.models import settings_of
from tests.benchmarks.random_weights import resnet50_variables
from tests.pictures import jpeg

LITE0 = CATALOG["efficientnet_lite0"]
ON_EACH = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"))],
)


@pytest.fixture(scope="module")
def pictures() -> Pixels:
    rules = LITE0.decode_rules(ProcessorSettings())
    return np.stack([decode(jpeg(seed), rules).pixels for seed in range(5)])


def lite0_weights(cache: Path) -> Path:
    return obtain(LITE0, WeightFolders.from_settings(ProcessorSettings(cache_dir=cache)), lambda _: None)


@ON_EACH
async def test_golden_vectors_and_parts(device: str, pictures: Pixels, tmp_path: Path) -> None:
    weights = lite0_weights(tmp_path)
    embedder = await CudaEmbedder(LITE0, "fp32", weights, device=device, free_bytes=lambda: 3).start()
    reference = await TorchEmbedder(LITE0, "fp32", weights).start()
    try:
        cosine = await check_golden(embedder, LITE0)
        embedder._picture_bytes = 1  # so that two fit
        vectors, expected = await embedder.embed(pictures), await reference.embed(pictures)
        alone = await embedder.embed(pictures[3:4])
    finally:
        await embedder.close()
        await reference.close()
    assert cosine is not None and cosine >= GOLDEN_COSINE["fp32"]
    assert np.min(np.sum(vectors * expected, axis=1)) >= GOLDEN_COSINE["fp32"]
    assert float(np.sum(alone * vectors[3:4])) >= GOLDEN_COSINE["fp32"]


@ON_EACH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
async def test_a_model_without_golden_vectors_is_held_to_the_processor(
    device: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = resnet50_variables(tmp_path)
    description = chosen(settings_of(variables, precision, tmp_path))
    weights = Path(variables["IMAGE_SEARCH_OWN_WEIGHTS"])
    embedder = await CudaEmbedder(description, precision, weights, device=device, free_bytes=lambda: 3).start()
    await embedder.close()
    monkeypatch.setitem(golden_check.GOLDEN_COSINE, precision, 1.1)
    with pytest.raises(ConfigurationError, match=f"other vectors for own in {precision}"):
        await CudaEmbedder(description, precision, weights, device=device, free_bytes=lambda: 3).start()


def test_without_a_gpu_asking_for_one_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ProcessorSettings(cache_dir=tmp_path, model_backend="torch", model_device="cuda")
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_MODEL_DEVICE"):
        asyncio.run(open_embedder(LITE0, asked))
    assert not [*tmp_path.iterdir()], "nothing was fetched or made for a host that cannot run it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
async def test_a_gpu_is_taken_where_there_is_one(tmp_path: Path) -> None:
    asked = ProcessorSettings(cache_dir=tmp_path, model_backend="torch")
    assert host.uses_gpu(asked)
    embedder = await open_embedder(LITE0, asked)
    await embedder.close()
    assert isinstance(embedder, CudaEmbedder)
    assert embedder._picture_bytes > 2**20, "a picture's feature maps take more than a megabyte"
