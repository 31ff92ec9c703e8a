"""The model in torch on an NVIDIA GPU: as many pictures at once as its memory holds, the next laid ready meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from infra.errors import ConfigurationError, TransientError
from processors.embedding.catalog import ModelDescription, Precision
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.golden_check import golden_of, golden_pixels, held_to
from processors.embedding.host import check_gpu_precision
from processors.embedding.model_thread import ModelThread
from processors.embedding.network import load_network

MOST_AT_ONCE: Final = 256
"""More at once is not faster, however much memory there is (docs/performance.md)."""

MEMORY_SHARE: Final = 0.8
"""Of the free memory. The rest is for what other processes take meanwhile, and for memory in pieces too small to use."""

MEASURED_AT: Final = 8
"""Pictures of the run that shows how much memory one takes."""


def pictures_that_fit(free_bytes: int, picture_bytes: int) -> int:
    """A power of two, so that the GPU sees few sizes, from 1 to MOST_AT_ONCE. `picture_bytes`: what one more picture takes."""
    fit = int(free_bytes * MEMORY_SHARE) // max(1, picture_bytes)
    return 1 << (min(max(1, fit), MOST_AT_ONCE).bit_length() - 1)


class CudaEmbedder(ModelThread):
    """fp32 is all of it: no TF32, which keeps 10 bits of 23. bf16 is the convolutions, by autocast; pooling stays in fp32."""

    _network: torch.nn.Module

    def __init__(
        self,
        description: ModelDescription,
        precision: Precision,
        weights: Path,
        threads: int = 0,
        projection: Path | None = None,
        *,
        device: str = "cuda",
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """`weights`, `projection`: files whose digests were checked (weights.py). `free_bytes`: of the device's memory."""
        super().__init__(description, precision, threads)
        self._weights = weights
        self._projection = projection
        self._device = torch.device(device)
        self._free_bytes = free_bytes or _free_on_gpu
        self._picture_bytes = 1

    def _check_host(self) -> None:
        if self._device.type == "cuda":
            check_gpu_precision(self._precision)

    def _load(self) -> None:
        torch.set_num_threads(self._threads)
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # torch gives it no types
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        network = load_network(self._description, self._weights, self._projection)
        pixels = golden_pixels(self._description)
        with torch.inference_mode():
            reference: Vectors = network(torch.from_numpy(pixels)).numpy()
        try:
            self._network = network.to(self._device).to(memory_format=torch.channels_last)
            if self._precision == "bf16":
                network.autocast_features(self._device.type)
            vectors = self._infer(pixels)
            self._picture_bytes = self._measured_picture_bytes()
        except RuntimeError as error:
            raise ConfigurationError(
                f"{self._description.name} does not run on the GPU of this host ({type(error).__name__}): its memory may be "
                "full, its driver too old for torch, or the model tied to the processor. `nvidia-smi` shows the first two. "
                "IMAGE_SEARCH_MODEL_DEVICE=cpu runs it on the processor"
            ) from error
        held_to(golden_of(self._description, reference), vectors, self._description.name, self._precision)

    def _embed(self, pixels: Pixels) -> Vectors:
        """Orders are given ahead: while the GPU computes one part, the next is laid ready. Vectors come back at the end."""
        at_once = pictures_that_fit(self._free_bytes(), self._picture_bytes) if len(pixels) > 1 else 1
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(pixels):
            try:
                parts.append(self._run(pixels[start : start + at_once]))
            except torch.OutOfMemoryError:
                at_once = self._fewer(min(at_once, len(pixels) - start))
                continue
            start += at_once
        if not parts:
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors: Vectors = torch.cat(parts).cpu().numpy()
        return vectors

    def _fewer(self, at_once: int) -> int:
        """Half as many. Someone else took memory since it was asked for. Only for this call: it may be given back."""
        if at_once == 1:
            raise TransientError("the GPU has no memory left for one picture: `nvidia-smi` shows who holds it")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return at_once // 2

    def _infer(self, part: Pixels) -> Vectors:
        vectors: Vectors = self._run(part).cpu().numpy()
        return vectors

    def _run(self, part: Pixels) -> torch.Tensor:
        """The vectors where they were computed, or will be: nothing waits for the GPU here."""
        with torch.inference_mode():
            vectors: torch.Tensor = self._network(self._uploaded(part))
        return vectors

    def _uploaded(self, part: Pixels) -> torch.Tensor:
        """By way of memory that is not swapped, which the GPU fetches by itself. torch uses it again once it was fetched."""
        if self._device.type != "cuda":
            return torch.from_numpy(np.array(part))
        pinned = torch.empty(part.shape, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[...] = part
        return pinned.to(self._device, non_blocking=True)

    def _measured_picture_bytes(self) -> int:
        if self._device.type != "cuda":
            return self._picture_bytes
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._infer(np.zeros((MEASURED_AT, *self.input_size, 3), dtype=np.uint8))
        return (torch.cuda.max_memory_allocated(self._device) - before) // MEASURED_AT


def _free_on_gpu() -> int:
    """What the driver has, and what torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info()
    return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
