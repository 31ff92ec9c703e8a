"""The model in torch on the processor: the reference that the other backends are held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from processors.embedding.catalog import ModelDescription, Precision
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.golden_check import golden_of, golden_pixels, held_to
from processors.embedding.model_thread import ModelThread
from processors.embedding.network import frozen_bf16, load_network


class TorchEmbedder(ModelThread):
    def __init__(
        self,
        description: ModelDescription,
        precision: Precision,
        weights: Path,
        threads: int = 0,
        projection: Path | None = None,
    ) -> None:
        """`weights`, `projection`: files whose digests were checked (weights.py)."""
        super().__init__(description, precision, threads)
        self._weights = weights
        self._projection = projection

    _network: torch.nn.Module

    def _load(self) -> None:
        torch.set_num_threads(self._threads)
        network = load_network(self._description, self._weights, self._projection)
        self._network = network
        if self._precision == "bf16":
            reference = self._infer(golden_pixels(self._description))
            self._network = frozen_bf16(network, self._description.input_size)
            golden = golden_of(self._description, reference)
            held_to(golden, self._infer(golden_pixels(self._description)), self._description.name, self._precision)

    def _infer(self, part: Pixels) -> Vectors:
        with torch.inference_mode():
            # A copy: torch warns about memory that is read-only, as decoded pictures are.
            vectors: Vectors = self._network(torch.from_numpy(np.array(part))).numpy()
        return vectors
