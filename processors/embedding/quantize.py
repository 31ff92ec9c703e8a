"""A converted network to int8, by NNCF: in the converting process only, for it needs the extra `training`.

Weights and activations of convolutions become int8. What is left in fp32: everything behind the last convolution, because a
power and its root of 256 steps are not what was pooled, and vectors would lose their unit length; and the first convolutions
of a network whose golden vectors need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from infra.errors import ConfigurationError
from processors.embedding.catalog import ModelDescription, Network
from processors.embedding.embedder import Pixels
from processors.embedding.openvino_runtime import openvino

import nncf  # type: ignore[import-untyped]  # isort: skip  # no types; calls home, too, unless openvino_runtime came first

_CONVOLUTIONS: Final = frozenset({"Convolution", "GroupConvolution"})
_SPARED: Final[Mapping[Network, int]] = {"efficientnet_lite0": 2}
"""First convolutions left in fp32. Of efficientnet_lite0 the stem and the first depthwise one: with them in int8 the golden
pictures' cosine to fp32 was 0.978, without 0.996 (calibrated on 150 clip-art pictures)."""


def quantized(model: Any, description: ModelDescription, pixels: Pixels) -> Any:  # noqa: ANN401 - openvino.Model, untyped
    """`model` in int8, calibrated on `pixels`. The same pictures give the same numbers on processors of one kind."""
    return nncf.quantize(
        model,
        nncf.Dataset([picture[None] for picture in pixels]),
        # Activations that are not cut off at zero keep their own range on both sides of it.
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pixels),
        fast_bias_correction=False,
        ignored_scope=nncf.IgnoredScope(names=_spared(model, description.network), validate=False),
    )


def _spared(model: openvino.Model, network: Network) -> list[str]:
    operations = [(operation.get_friendly_name(), operation.get_type_name()) for operation in model.get_ordered_ops()]
    convolutions = [place for place, (_, kind) in enumerate(operations) if kind in _CONVOLUTIONS]
    if not convolutions:
        raise ConfigurationError(f"{network} has no convolutions that int8 would make faster")
    behind = [name for name, kind in operations[convolutions[-1] + 1 :] if kind not in ("Constant", "Result")]
    return [operations[place][0] for place in convolutions[: _SPARED.get(network, 0)]] + behind
