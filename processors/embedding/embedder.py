"""What the pipeline and the query service need of a model, whatever runs it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from schemas.identity import ModelFingerprint

Pixels = npt.NDArray[np.uint8]
"""Prepared pictures: shape (n, height, width, 3), RGB, at the model's input size."""

Vectors = npt.NDArray[np.float32]
"""Unit vectors: shape (n, dimension)."""


class Embedder(Protocol):
    """Pixels to unit vectors. Runs off the event loop, on a thread of its own; calls are worked on one after another."""

    @property
    def fingerprint(self) -> ModelFingerprint: ...

    @property
    def dimension(self) -> int: ...

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the pictures it takes."""

    async def embed(self, pixels: Pixels) -> Vectors: ...

    async def close(self) -> None: ...
