"""Bytes to pixels, safely: the one way for pictures that are indexed and for pictures that are searched with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.errors import ImageRejected
from processors.raster import DecodeRules, Raster, Refusal, render
from schemas.events import ReasonCode


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """`pixels`: uint8, shape (height, width, 3), RGB, at the model's input size, read-only.

    `width` and `height` are those of the original, as people see it upright; `format` is Pillow's name of its kind.
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int
    format: str


def decode(data: bytes, rules: DecodeRules) -> Decoded:
    """Decode here, in this process, with no limit of time or memory: for bytes that one trusts.

    Bytes from outside go through DecodePool. Raises ImageRejected.
    """
    outcome = from_raster(render(data, rules), rules)
    if isinstance(outcome, ImageRejected):
        raise outcome
    return outcome


def from_raster(outcome: Raster | Refusal, rules: DecodeRules) -> Decoded | ImageRejected:
    """What came out of a decode process, in the terms of everyone else."""
    if isinstance(outcome, Refusal):
        return ImageRejected(ReasonCode(outcome.code), outcome.message)
    pixels = np.frombuffer(outcome.rgb, dtype=np.uint8).reshape(rules.height, rules.width, 3)
    return Decoded(pixels, outcome.width, outcome.height, outcome.format)
