"""The networks in torch: pixels in, unit vectors out, everything between them inside. Imports torch: never in a service.

This is the reference. The torch backend runs it, the OpenVINO graph is converted from it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import efficientnet_lite_pytorch  # type: ignore[import-untyped]  # the package brings no types
import torch
import torchvision  # type: ignore[import-untyped]  # the package brings no types
from torch.nn import functional

from infra.errors import ConfigurationError
from processors.embedding.catalog import GEM_FLOOR, FittedProjection, ModelDescription, Projection
from processors.embedding.checkpoint import State, read_state
from processors.embedding.projection import orthonormal_projection
from processors.embedding.projection_file import FittedMap, read_projection


class EmbeddingNetwork(torch.nn.Module):
    """uint8 (n, height, width, 3), RGB, to float32 (n, dimension), unit vectors."""

    _mean: torch.Tensor
    _deviation: torch.Tensor
    _matrix: torch.Tensor | None
    _offset: torch.Tensor | None

    def __init__(self, description: ModelDescription, body: torch.nn.Module, fitted: FittedMap | None = None) -> None:
        """`body`: normalised planes to vectors of any length."""
        super().__init__()
        self._body = body
        self.register_buffer("_mean", torch.tensor(description.mean).view(1, 3, 1, 1))
        self.register_buffer("_deviation", torch.tensor(description.deviation).view(1, 3, 1, 1))
        self.register_buffer("_matrix", None if fitted is None else torch.from_numpy(fitted.matrix))
        self.register_buffer("_offset", None if fitted is None else torch.from_numpy(-fitted.matrix @ fitted.mean))

    def trained_part(self) -> torch.nn.Module:
        """What is trained, and what is nearly all of the work. No property: torch reads those of what it traces."""
        assert isinstance(self._body, _Pooled), "a network that pools by itself cannot be taken apart"
        return self._body.features

    def features_to_bf16(self) -> None:
        assert isinstance(self._body, _Pooled), "a network that pools by itself does not come in bf16"
        self._body.features_to_bf16()

    def autocast_features(self, device_type: str) -> None:
        """From now on bf16 where that is enough, while the weights and their gradients stay in fp32."""
        assert isinstance(self._body, _Pooled), "a network that pools by itself does not come in bf16"
        self._body.autocast = device_type

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        planes = (pixels.permute(0, 3, 1, 2).to(torch.float32) - self._mean) / self._deviation
        vectors = functional.normalize(self._body(planes), dim=1)
        if self._matrix is not None:
            vectors = functional.normalize(functional.linear(vectors, self._matrix, self._offset), dim=1)
        return vectors


class _Pooled(torch.nn.Module):
    """Feature maps, their generalised mean, and a linear map of it to fewer dimensions, if there is one."""

    _matrix: torch.Tensor | None
    _offset: torch.Tensor | None

    def __init__(
        self,
        features: torch.nn.Module,
        gem_power: float,
        matrix: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.autocast = ""
        self._gem_power = gem_power
        self.register_buffer("_matrix", matrix)
        self.register_buffer("_offset", offset)

    def features_to_bf16(self) -> None:
        self.features = _Bf16Features(self.features)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        maps = self._maps(planes)
        vectors = maps.clamp(min=GEM_FLOOR).pow(self._gem_power).mean((2, 3)).pow(1.0 / self._gem_power)
        if self._offset is not None:
            # A map with an offset was learned on unit vectors; without one, their length makes no difference.
            vectors = functional.normalize(vectors, dim=1)
        return vectors if self._matrix is None else functional.linear(vectors, self._matrix, self._offset)

    def _maps(self, planes: torch.Tensor) -> torch.Tensor:
        if not self.autocast:
            maps: torch.Tensor = self.features(planes)
            return maps
        with torch.autocast(self.autocast, dtype=torch.bfloat16):
            maps = self.features(planes.to(memory_format=torch.channels_last))
        # Pooling in fp32, as below.
        return maps.float()


class _Bf16Features(torch.nn.Module):
    """The convolutions, which are nearly all of the work, in bf16 and in the order of memory that they are fastest in.

    Pooling stays in fp32: a power and its root of numbers with eight bits cost more than all the rest.
    """

    def __init__(self, features: torch.nn.Module) -> None:
        super().__init__()
        self._inner = features.to(torch.bfloat16).to(memory_format=torch.channels_last)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self._inner(planes.to(torch.bfloat16, memory_format=torch.channels_last))
        return maps.float()


class _EfficientNetFeatures(torch.nn.Module):
    def __init__(self, network: efficientnet_lite_pytorch.EfficientNet) -> None:
        super().__init__()
        self._network = network

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self._network.extract_features(planes)
        return maps


def _efficientnet_lite0(description: ModelDescription, state: State) -> torch.nn.Module:
    network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    network._fc = torch.nn.Identity()
    network.load_state_dict(_without_classifier(state, "_fc."))
    return _Pooled(_EfficientNetFeatures(network), _power(description.gem_power))


def _resnet50(description: ModelDescription, state: State) -> torch.nn.Module:
    network = torchvision.models.resnet50()
    network.fc = torch.nn.Identity()
    network.load_state_dict(_without_classifier(state, "fc."))
    matrix = None
    if isinstance(description.projection, Projection):
        projection = description.projection
        matrix = torch.from_numpy(orthonormal_projection(projection.seed, description.dimension, projection.columns))
    return _Pooled(_resnet_features(network), _power(description.gem_power), matrix)


def _gl18_resnet50(description: ModelDescription, state: State) -> torch.nn.Module:
    """Power of the pooling and whitening come with the weights. The first rows of a whitening are the strongest."""
    features = _resnet_features(torchvision.models.resnet50())
    features.load_state_dict({name.removeprefix("features."): state[name] for name in state if name.startswith("features.")})
    [power] = state["pool.p"].flatten().tolist()
    if description.projection is None:
        return _Pooled(features, _power(power))
    weight, bias = state["whiten.weight"], state["whiten.bias"]
    columns = description.projection.columns
    if weight.shape != (columns, columns) or bias.shape != (columns,):
        raise ValueError("the whitening has another size")
    kept = description.dimension
    return _Pooled(features, _power(power), weight[:kept].clone().float(), bias[:kept].clone().float())


def _resnet_features(network: torch.nn.Module) -> torch.nn.Sequential:
    # Without the last two: averaging and the classifier, in whose place GeM stands.
    return torch.nn.Sequential(*list(network.children())[:-2])


def _without_classifier(state: State, prefix: str) -> State:
    """It is not used, and a network that was trained on other classes has one of another size."""
    return {name: values for name, values in state.items() if not name.startswith(prefix)}


def _power(power: float | None) -> float:
    if power is None or not math.isfinite(power) or power <= 0:
        raise ValueError("the pooling needs a power above 0")
    return power


_BUILDERS: Final[Mapping[str, Callable[[ModelDescription, State], torch.nn.Module]]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "resnet50": _resnet50,
    "gl18_resnet50": _gl18_resnet50,
}


def load_network(description: ModelDescription, weights: Path, projection: Path | None = None) -> EmbeddingNetwork:
    """Build the network with the weights of a file whose digest was checked. Raises ConfigurationError when they do not fit.

    `projection`: the file of a fitted projection, its digest checked as well.
    """
    fitted = None
    if isinstance(description.projection, FittedProjection):
        assert projection is not None, "who opens a model brings its projection"
        fitted = read_projection(projection, description)
        description = description.unprojected()
    if description.network == "torchscript":
        script = _torchscript(description, weights)
        _checked(EmbeddingNetwork(description, script).eval(), description, weights)
        return EmbeddingNetwork(description, script, fitted).eval()
    state = read_state(weights, description.weights.form)
    try:
        body = _BUILDERS[description.network](description, state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{weights} does not hold the weights of {description.network}") from error
    return EmbeddingNetwork(description, body, fitted).eval()


def named_features(network: EmbeddingNetwork, description: ModelDescription) -> dict[str, torch.Tensor]:
    """The weights that training changes, by the names that a file of weights has them under."""
    state = network.trained_part().state_dict()
    if description.network == "efficientnet_lite0":
        return {name.removeprefix("_network."): values for name, values in state.items()}
    # The parts of a sequence are numbered; torchvision names them.
    parts = [name for name, _ in torchvision.models.resnet50().named_children()]
    named = {}
    for name, values in state.items():
        number, _, rest = name.partition(".")
        named[f"features.{name}" if description.network == "gl18_resnet50" else f"{parts[int(number)]}.{rest}"] = values
    return named


def frozen_bf16(network: EmbeddingNetwork, input_size: tuple[int, int]) -> torch.nn.Module:
    """The network with its convolutions in bf16 and what never changes folded into them. Takes `network` apart."""
    network.features_to_bf16()
    example = torch.zeros((2, *input_size, 3), dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode():
        # torch wants networks to be compiled in another way, which takes a compiler on the host and minutes at each start.
        warnings.simplefilter("ignore", FutureWarning)
        frozen: torch.nn.Module = torch.jit.freeze(torch.jit.trace(network, example))  # type: ignore[no-untyped-call]  # torch gives it no types
    return frozen


def _torchscript(description: ModelDescription, weights: Path) -> torch.nn.Module:
    if description.weights.form != "torchscript":
        raise ConfigurationError(f"{description.name} is TorchScript, and its row does not say so")
    try:
        with warnings.catch_warnings():
            # torch wants newer programs to be exported in another form; these exist in this one.
            warnings.simplefilter("ignore", FutureWarning)
            script: torch.nn.Module = torch.jit.load(weights, map_location="cpu")  # type: ignore[no-untyped-call]  # torch gives it no types
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigurationError(f"{weights} is no TorchScript that this version of torch can read") from error
    return script


def _checked(network: EmbeddingNetwork, description: ModelDescription, weights: Path) -> EmbeddingNetwork:
    """What a program of someone else's makes of pictures is known only once it has run."""
    pixels = torch.zeros((2, *description.input_size, 3), dtype=torch.uint8)
    try:
        with torch.inference_mode():
            found = network(pixels).shape
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigurationError(
            f"the TorchScript {weights} fails on two pictures of {description.input_size}: it must take float planes "
            "(n, 3, height, width) and give vectors (n, dimension)"
        ) from error
    if found != (2, description.dimension):
        raise ConfigurationError(
            f"the TorchScript {weights} gives {tuple(found)} for two pictures, not {(2, description.dimension)}"
        )
    return network
