"""bf16: another fingerprint, held to what fp32 computes, and refused where the processor or the model does not have it.

The ResNet50 here has random weights. Its vectors lie so near each other that any cosine is high, so they are compared after
their mean is taken away; how much of a trained one's recall bf16 costs is not shown by it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision  # type: ignore[import-untyped]  # the package brings no types

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings
from processors.decode import decode
from processors.embedding import golden_check, host, open_embedder, prepare_model
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.embedder import Vectors
from processors.embedding.golden_check import GOLDEN_COSINE, GoldenVectors
from processors.embedding.model_cache import GOLDEN_FILE, Manifest
from processors.embedding.weights import file_digest
from tests.pictures import jpeg

BACKENDS = ["openvino", "torch"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(19)
    torch.save(torchvision.models.resnet50().state_dict(), folder / "random.pth")
    return folder


@pytest.fixture
def bf16_host() -> None:
    try:
        host.check_precision("bf16")
    except ConfigurationError:
        pytest.skip("the processor of this host has no bf16")


def settings_for(cache: Path, backend: str, precision: str) -> ProcessorSettings:
    path = cache / "random.pth"
    return ProcessorSettings.model_validate(
        {
            "model": "own",
            "own_weights": str(path),
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "own_input_pixels": 96,
            "cache_dir": cache,
            "model_backend": backend,
            "model_precision": precision,
        }
    )


async def vectors_of(settings: ProcessorSettings) -> Vectors:
    row = chosen(settings)
    embedder = await open_embedder(row, settings)
    try:
        assert embedder.fingerprint == fingerprint(row, precision_asked(settings))
        rules = row.decode_rules(settings)
        return await embedder.embed(np.stack([decode(jpeg(seed), rules).pixels for seed in range(12)]))
    finally:
        await embedder.close()


@pytest.mark.usefixtures("bf16_host")
@pytest.mark.parametrize("backend", BACKENDS)
async def test_bf16_computes_nearly_what_fp32_computes(cache: Path, backend: str) -> None:
    reference = await vectors_of(settings_for(cache, "torch", "fp32"))
    vectors = await vectors_of(settings_for(cache, backend, "bf16"))
    assert float(np.sum(vectors * reference, axis=1).min()) >= GOLDEN_COSINE["bf16"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
    centre = reference.mean(axis=0)
    one, other = reference - centre, vectors - centre
    cosines = np.sum(one * other, axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert float(cosines.min()) >= 0.9
    assert float(cosines.max()) < 0.99999, "or it was not bf16"


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_host_without_bf16_refuses_it(
    cache: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t:\n")
    monkeypatch.setattr(host, "PROCESSOR_FACTS", facts)
    settings = settings_for(cache, backend, "bf16")
    with pytest.raises(ConfigurationError, match="no bf16"):
        await prepare_model(settings, print)
    facts.write_text("processor\t: 0\n")
    with pytest.raises(ConfigurationError, match="no bf16"):
        host.check_precision("bf16")
    host.check_precision("fp32")
    facts.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\n")
    host.check_precision("bf16")


async def test_a_model_that_bf16_hurts_does_not_come_in_it() -> None:
    settings = ProcessorSettings(model_precision="bf16")
    with pytest.raises(ConfigurationError, match="efficientnet_lite0 comes in fp32, int8, not in bf16"):
        await prepare_model(settings, print)


@pytest.mark.usefixtures("bf16_host")
async def test_on_torch_bf16_is_held_to_fp32_at_every_start(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(golden_check.GOLDEN_COSINE, "bf16", 1.1)
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_MODEL_PRECISION=fp32"):
        await vectors_of(settings_for(cache, "torch", "bf16"))


async def test_a_converted_model_is_held_to_torch_at_every_start(cache: Path) -> None:
    """Also one without golden vectors in the package, as a checkpoint of one's own never has them."""
    settings = settings_for(cache, "openvino", "fp32")
    folder = (await prepare_model(settings, print)).path.parent
    golden = GoldenVectors.model_validate_json((folder / GOLDEN_FILE).read_bytes())
    assert golden.fingerprint == fingerprint(chosen(settings), "fp32") and len(golden.vectors) == 2
    await vectors_of(settings)

    turned = {name: [-value for value in vector] for name, vector in golden.vectors.items()}
    (folder / GOLDEN_FILE).write_text(golden.model_copy(update={"vectors": turned}).model_dump_json())
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    files = {**manifest.files, GOLDEN_FILE: file_digest(folder / GOLDEN_FILE)}
    (folder / "manifest.json").write_text(manifest.model_copy(update={"files": files}).model_dump_json())
    with pytest.raises(ConfigurationError, match="computes other vectors"):
        await vectors_of(settings)
