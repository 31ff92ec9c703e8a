"""What every backend shares: one thread that runs the model, and the order of work on it."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Self

import numpy as np

from processors.embedding.catalog import ModelDescription, Precision, fingerprint
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.host import check_precision
from schemas.identity import ModelFingerprint

PICTURES_AT_ONCE = 8
"""A larger batch is run in parts of this size: throughput is flat from 4 to 64, and 64 at once took 500 MB more."""


class ModelThread(ABC):
    """An Embedder whose model lives on one thread. A backend loads the model and runs a part of a batch."""

    warm_up_sizes: ClassVar[range] = range(1, 2)
    """Sizes of a part that are run once at the start, because the backend prepares something for each."""

    def __init__(self, description: ModelDescription, precision: Precision, threads: int) -> None:
        """`threads`: of the model itself; 0: one for each processor that this process may use."""
        self._description = description
        self._precision = precision
        self._fingerprint = fingerprint(description, precision)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    @property
    def fingerprint(self) -> ModelFingerprint:
        return self._fingerprint

    @property
    def dimension(self) -> int:
        return self._description.dimension

    @property
    def input_size(self) -> tuple[int, int]:
        return self._description.input_size

    async def start(self) -> Self:
        """Load the model and run it, so that no picture waits for what the first run prepares. Raises ConfigurationError."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._load_and_warm)
        except BaseException:
            await self.close()
            raise
        return self

    async def embed(self, pixels: Pixels) -> Vectors:
        """Raises ValueError unless `pixels` is uint8 of shape (n, height, width, 3) at the input size; n may be 0."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (*self.input_size, 3):
            raise ValueError(f"expected uint8 pictures of {self.input_size}, got {pixels.dtype} {pixels.shape}")
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._embed, pixels)

    async def close(self) -> None:
        """Waits for the call that runs. May be called twice."""
        await asyncio.to_thread(self._executor.shutdown)

    @abstractmethod
    def _load(self) -> None:
        """Load the model. On the model's thread. Raises ConfigurationError."""

    @abstractmethod
    def _infer(self, part: Pixels) -> Vectors:
        """Unit vectors of 1 to PICTURES_AT_ONCE pictures. On the model's thread."""

    def _check_host(self) -> None:
        """Raises ConfigurationError where the model would run in another precision than it is asked to."""
        check_precision(self._precision)

    def _load_and_warm(self) -> None:
        self._check_host()
        self._load()
        for count in self.warm_up_sizes:
            self._infer(np.zeros((count, *self.input_size, 3), dtype=np.uint8))

    def _embed(self, pixels: Pixels) -> Vectors:
        vectors = np.empty((len(pixels), self.dimension), dtype=np.float32)
        for start in range(0, len(pixels), PICTURES_AT_ONCE):
            vectors[start : start + PICTURES_AT_ONCE] = self._infer(pixels[start : start + PICTURES_AT_ONCE])
        return vectors
