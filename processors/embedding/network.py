"""The networks in torch: pixels in, unit vectors out, everything between them inside. Imports torch: never in a service.

This is the reference. The torch backend runs it, the OpenVINO graph is converted from it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import efficientnet_lite_pytorch  # type: ignore[import-untyped]  # the package brings no types
import torch
import torchvision  # type: ignore[import-untyped]  # the package brings no types
from torch.nn import functional

from infra.errors import ConfigurationError
from processors.embedding.catalog import GEM_FLOOR, ModelDescription
from processors.embedding.projection import orthonormal_projection

State: TypeAlias = Mapping[str, torch.Tensor]


class EmbeddingNetwork(torch.nn.Module):
    """uint8 (n, height, width, 3), RGB, to float32 (n, dimension), unit vectors."""

    _mean: torch.Tensor
    _deviation: torch.Tensor
    _projection: torch.Tensor | None

    def __init__(self, description: ModelDescription, features: torch.nn.Module) -> None:
        super().__init__()
        self._features = features
        self._gem_power = description.gem_power
        self.register_buffer("_mean", torch.tensor(description.mean).view(1, 3, 1, 1))
        self.register_buffer("_deviation", torch.tensor(description.deviation).view(1, 3, 1, 1))
        projection = description.projection
        matrix = orthonormal_projection(projection.seed, description.dimension, projection.columns) if projection else None
        self.register_buffer("_projection", None if matrix is None else torch.from_numpy(matrix))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        planes = (pixels.permute(0, 3, 1, 2).to(torch.float32) - self._mean) / self._deviation
        maps = self._features(planes)
        vectors = maps.clamp(min=GEM_FLOOR).pow(self._gem_power).mean((2, 3)).pow(1.0 / self._gem_power)
        if self._projection is not None:
            vectors = functional.linear(vectors, self._projection)
        return functional.normalize(vectors, dim=1)


class _EfficientNetFeatures(torch.nn.Module):
    def __init__(self, network: efficientnet_lite_pytorch.EfficientNet) -> None:
        super().__init__()
        self._network = network

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self._network.extract_features(planes)
        return maps


def _efficientnet_lite0(state: State) -> torch.nn.Module:
    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    return _EfficientNetFeatures(network)


def _resnet50(state: State) -> torch.nn.Module:
    network = torchvision.models.resnet50()
    network.load_state_dict(state)
    # Without the last two: averaging and the classifier, in whose place GeM stands.
    return torch.nn.Sequential(*list(network.children())[:-2])


_BUILDERS: Final[Mapping[str, Callable[[State], torch.nn.Module]]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "resnet50": _resnet50,
}


def load_network(description: ModelDescription, weights: Path) -> EmbeddingNetwork:
    """Build the network with the weights of a file whose digest was checked. Raises ConfigurationError when they do not fit."""
    try:
        # Only tensors: a pickle could run code.
        state: State = torch.load(weights, map_location="cpu", weights_only=True)
        features = _BUILDERS[description.network](state)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{weights} does not hold the weights of {description.network}") from error
    return EmbeddingNetwork(description, features).eval()
