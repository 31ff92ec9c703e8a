"""The way to a GPU, on hosts without one: whether it is taken, how much goes to it at once, and what is done when it is full.

What needs a real one is in tests/integration/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ConfigurationError, TransientError
from infra.settings import ProcessorSettings
from processors.embedding import cuda_backend, host
from processors.embedding.catalog import CATALOG
from processors.embedding.cuda_backend import MOST_AT_ONCE, CudaEmbedder, pictures_that_fit
from processors.embedding.embedder import Pixels
from processors.embedding.host import check_host, uses_gpu

MIB = 2**20
LITE0 = CATALOG["efficientnet_lite0"]


def settings(backend: str, device: str) -> ProcessorSettings:
    return ProcessorSettings(model_backend=backend, model_device=device)


@pytest.mark.parametrize(
    ("free", "picture", "expected"),
    [
        (80_000 * MIB, 20 * MIB, MOST_AT_ONCE),
        (2_000 * MIB, 20 * MIB, 64),
        (1_600 * MIB, 20 * MIB, 64),
        (1_599 * MIB, 20 * MIB, 32),
        (10 * MIB, 20 * MIB, 1),
        (0, 20 * MIB, 1),
        (1_000 * MIB, 0, MOST_AT_ONCE),
    ],
)
def test_how_many_pictures_fit(free: int, picture: int, expected: int) -> None:
    assert pictures_that_fit(free, picture) == expected


@pytest.mark.parametrize(
    ("backend", "device", "there", "used"),
    [
        ("torch", "auto", True, True),
        ("torch", "auto", False, False),
        ("torch", "cpu", True, False),
        ("torch", "cuda", True, True),
        ("openvino", "auto", True, False),
        ("openvino", "cpu", True, False),
    ],
)
def test_which_device_is_used(backend: str, device: str, there: bool, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert uses_gpu(settings(backend, device)) is used


@pytest.mark.parametrize(
    ("backend", "cuda", "message"),
    [
        ("torch", "13.0", "MODEL_DEVICE: torch finds no NVIDIA GPU"),
        ("torch", None, "MODEL_DEVICE: this build of torch has no CUDA"),
        ("openvino", "13.0", "MODEL_DEVICE: cuda needs IMAGE_SEARCH_MODEL_BACKEND=torch"),
    ],
)
def test_a_gpu_that_is_asked_for_and_missing(
    backend: str, cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigurationError, match=message):
        check_host(settings(backend, "cuda"), "fp32")


def test_on_a_gpu_bf16_is_asked_of_the_gpu_and_not_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "cpuinfo"
    plain.write_text("flags : avx2\n")
    monkeypatch.setattr(host, "PROCESSOR_FACTS", plain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_host(settings("torch", "auto"), "bf16")
    with pytest.raises(ConfigurationError, match="the processor of this host has no bf16"):
        check_host(settings("torch", "cpu"), "bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ConfigurationError, match="the GPU of this host has no bf16"):
        check_host(settings("torch", "auto"), "bf16")


class SmallMemory(torch.nn.Module):
    """Vectors that tell which picture they are of, from a device that holds no more than `most` pictures."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.asked: list[int] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pixels[:, 0, 0, :1].float().expand(-1, LITE0.dimension)


def embedder_on(network: SmallMemory, free_bytes: Callable[[], int]) -> CudaEmbedder:
    embedder = CudaEmbedder(LITE0, "fp32", Path("unread"), device="cpu", free_bytes=free_bytes)
    embedder._network, embedder._picture_bytes = network, MIB
    return embedder


def numbered(count: int) -> Pixels:
    pixels = np.zeros((count, *LITE0.input_size, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return pixels


async def test_a_batch_is_run_in_parts_that_fit_and_comes_back_in_order() -> None:
    network = SmallMemory(most=8)
    embedder = embedder_on(network, lambda: 10 * MIB)
    vectors = await embedder.embed(numbered(20))
    await embedder.close()
    assert network.asked == [8, 8, 4]
    assert vectors[:, 0].tolist() == list(range(20)) and vectors.shape == (20, LITE0.dimension)


async def test_memory_that_is_gone_halves_the_parts_and_loses_no_picture() -> None:
    network = SmallMemory(most=3)
    embedder = embedder_on(network, lambda: 10_000 * MIB)
    vectors = await embedder.embed(numbered(9))
    assert network.asked == [9, 4, 2, 2, 2, 2, 1]
    assert vectors[:, 0].tolist() == list(range(9))
    network.most, network.asked = 100, []
    await embedder.embed(numbered(9))
    await embedder.close()
    assert network.asked == [9], "the next call asks anew how much is free"


async def test_no_memory_for_one_picture_may_pass() -> None:
    embedder = embedder_on(SmallMemory(most=0), lambda: 0)
    with pytest.raises(TransientError, match="no memory left for one picture"):
        await embedder.embed(numbered(2))
    assert (await embedder.embed(numbered(0))).shape == (0, LITE0.dimension)
    await embedder.close()


def test_how_much_is_free_is_what_the_driver_has_and_what_torch_could_use_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20)
    assert cuda_backend._free_on_gpu() == 130
