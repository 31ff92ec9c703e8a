"""One network that learns, on a thread of its own, so that pictures are decoded meanwhile. Imports torch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar

import numpy as np
import torch

from infra.errors import ConfigurationError
from processors.embedding.catalog import ModelDescription
from processors.embedding.checkpoint import State, read_state
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.host import check_precision
from processors.embedding.network import load_network, named_features
from processors.training.losses import Objective

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
TrainingPrecision: TypeAlias = Literal["auto", "fp32", "bf16"]
T = TypeVar("T")

PICTURES_AT_ONCE: Final = 64
"""Embedded in one call."""

LARGEST_GRADIENT: Final = 1.0
"""A step whose gradient is longer is shortened to it."""

WARM_UP: Final = 0.1
"""Share of all steps in which the learning rate rises."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where it runs and in which precision, decided."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]


def hardware(device: Device, precision: TrainingPrecision) -> Hardware:
    """`auto`: a GPU if there is one, and bf16 if that GPU has it. Raises ConfigurationError for what this host has not.

    fp16 is not offered: its gradients vanish without being scaled, bf16's do not.
    """
    found: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and found == "cpu":
        raise ConfigurationError("--device cuda: torch finds no GPU here that it can use")
    on = found if device == "auto" else device
    if on == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise ConfigurationError("--precision bf16: this GPU has no bf16 (it came with compute capability 8.0): use fp32")
        return Hardware("cuda", "bf16" if has_bf16 and precision != "fp32" else "fp32")
    if precision == "bf16":
        check_precision("bf16")
    return Hardware("cpu", "bf16" if precision == "bf16" else "fp32")


class Trainer:
    """Close it. Nothing in it is left to chance: batch norm is frozen, nothing is dropped out."""

    def __init__(self, description: ModelDescription, weights: Path, on: Hardware, objective: Objective, threads: int) -> None:
        """`weights`: a file whose digest was checked. Call `start` next."""
        self._description = description
        self._weights = weights
        self._on = on
        self._objective = objective
        self._threads = threads
        self._thread = ThreadPoolExecutor(1, "training")

    @property
    def dimension(self) -> int:
        return self._description.dimension

    async def start(self) -> None:
        await self._run(self._load)

    async def step(self, pixels: Sequence[Pixels], groups: Sequence[int], learning_rate: float) -> float:
        """Learn from one batch; its loss before that. Raises ConfigurationError when the loss is no number any more."""
        return await self._run(lambda: self._learn(pixels, groups, learning_rate))

    async def embed(self, pixels: Pixels) -> Vectors:
        return await self._run(lambda: self._embed(pixels))

    async def weights(self) -> State:
        """All that a file of weights holds: what was trained, and what the parent's file has beside it."""
        return await self._run(self._weights_now)

    async def state(self) -> dict[str, Any]:
        """What `restore` takes: tensors and plain values, to be written before the next step changes them."""
        return await self._run(
            lambda: {"features": self._network.trained_part().state_dict(), "optimizer": self._optimizer.state_dict()}
        )

    async def restore(self, state: dict[str, Any]) -> None:
        def restore() -> None:
            self._network.trained_part().load_state_dict(state["features"])
            self._optimizer.load_state_dict(state["optimizer"])

        await self._run(restore)

    def close(self) -> None:
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except torch.OutOfMemoryError as error:
            # Of the GPU: the system's own memory never runs out in this way.
            raise ConfigurationError(
                "the GPU has too little memory left: give a smaller --batch-size and another --output, or end what else uses it"
            ) from error

    def _load(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        # In evaluation mode: running statistics of a small batch would be worse than those the network came with.
        network = load_network(self._description, self._weights).to(self._on.device)
        self._network = network
        freeze(network)
        if self._on.precision == "bf16":
            network.autocast_features(self._on.device)
        if self._on.device == "cuda":
            network.trained_part().to(memory_format=torch.channels_last)
        trained = [values for values in network.parameters() if values.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=0.0)
        self._trained = trained

    def _learn(self, pixels: Sequence[Pixels], groups: Sequence[int], learning_rate: float) -> float:
        for of_optimizer in self._optimizer.param_groups:
            of_optimizer["lr"] = learning_rate
        vectors = self._network(self._to_device(np.stack(pixels)))
        loss = self._objective(vectors, torch.tensor(groups, device=self._on.device))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        torch.nn.utils.clip_grad_norm_(self._trained, LARGEST_GRADIENT)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ConfigurationError("the loss is no number any more: give a smaller --learning-rate, and another --output")
        self._optimizer.step()
        return value

    def _embed(self, pixels: Pixels) -> Vectors:
        with torch.inference_mode():
            parts = [
                self._network(self._to_device(pixels[begin : begin + PICTURES_AT_ONCE])).cpu().numpy()
                for begin in range(0, len(pixels), PICTURES_AT_ONCE)
            ]
        vectors: Vectors = np.concatenate(parts)
        return vectors

    def _to_device(self, pixels: Pixels) -> torch.Tensor:
        planes = torch.from_numpy(pixels)
        # From pinned memory the copy to the GPU does not hold this thread up.
        return planes.pin_memory().to("cuda", non_blocking=True) if self._on.device == "cuda" else planes

    def _weights_now(self) -> State:
        trained = named_features(self._network, self._description)
        parent = read_state(self._weights, self._description.weights.form)
        classifier = ("_fc.", "fc.")
        beside = {name: values for name, values in parent.items() if name not in trained and not name.startswith(classifier)}
        return {**beside, **{name: values.detach().cpu().contiguous() for name, values in trained.items()}}


def freeze(network: torch.nn.Module) -> None:
    """Batch norm keeps its statistics, its factors and its offsets; nothing else changes either but the features."""
    network.eval()
    for part in network.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            for values in part.parameters(recurse=False):
                values.requires_grad = False


def rate_at(step: int, steps: int, learning_rate: float) -> float:
    """Rises over the first steps, then falls along a cosine to 0. Known from the step alone, so there is nothing to keep."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return learning_rate * (step + 1) / rising
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
