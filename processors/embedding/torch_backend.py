"""The model in torch on the processor: the reference that the other backends are held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from processors.embedding.catalog import ModelDescription, Precision
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.model_thread import ModelThread
from processors.embedding.network import load_network


class TorchEmbedder(ModelThread):
    def __init__(self, description: ModelDescription, precision: Precision, weights: Path, threads: int = 0) -> None:
        """`weights`: a file whose digest was checked (weights.py)."""
        super().__init__(description, precision, threads)
        self._weights = weights

    def _load(self) -> None:
        torch.set_num_threads(self._threads)
        self._network = load_network(self._description, self._weights)

    def _infer(self, part: Pixels) -> Vectors:
        with torch.inference_mode():
            # A copy: torch warns about memory that is read-only, as decoded pictures are.
            vectors: Vectors = self._network(torch.from_numpy(np.array(part))).numpy()
        return vectors
