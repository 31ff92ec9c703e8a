"""What a collection that is made now leaves to this host: what int8 is calibrated on, and which precision `auto` becomes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings
from processors.embedding import check_golden, open_embedder
from processors.embedding.calibration import gather
from processors.embedding.catalog import AUTO, ModelDescription, Precision
from processors.embedding.choice import chosen
from processors.embedding.host import check_host, uses_gpu
from processors.embedding.model_thread import PICTURES_AT_ONCE

MEASURE_SECONDS: Final = 1.5
PICTURES_ON_A_GPU: Final = 64
"""Handed to a GPU at once, as a full batch of a worker: with few it waits for the next order, in any precision."""

WORTH_IT: Final = 1.1
"""What is less exact must be this many times as fast: two measurements of one model differ by some percent."""


@dataclass(frozen=True, slots=True)
class Measured:
    """`pictures_per_second`: None where this host does not run the model in that precision; then `why_not` says why."""

    precision: Precision
    pictures_per_second: float | None = None
    golden_cosine: float | None = None
    why_not: str = ""


def choose(measured: Sequence[Measured]) -> Measured:
    """The fastest that runs; of those about as fast the first, so give the most exact one first. Raises ConfigurationError."""
    best: Measured | None = None
    for one in measured:
        if one.pictures_per_second is None:
            continue
        if best is None or best.pictures_per_second is None or one.pictures_per_second >= WORTH_IT * best.pictures_per_second:
            best = one
    if best is None:
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: auto found none that runs on this host: "
            + "; ".join(f"{one.precision}: {one.why_not}" for one in measured)
        )
    return best


async def decided(settings: ProcessorSettings, buckets: Sequence[str], say: Callable[[str], None]) -> ProcessorSettings:
    """The settings with a precision in place of `auto`, and with what int8 is calibrated on.

    `auto` takes a minute or a few: each precision of the model is converted and run. Raises ConfigurationError, and
    TransientError when the store does not answer.
    """
    if settings.model_precision == "int8":
        check_host(settings, "int8")
        return await _calibrated(settings, buckets, say)
    if settings.model_precision != AUTO:
        return settings
    description = chosen(settings)
    ready: dict[Precision, ProcessorSettings] = {}
    measured = []
    for precision in description.precisions:
        try:
            check_host(settings, precision)
            ready[precision] = await _ready(settings, precision, buckets, say)
            measured.append(await _measure(ready[precision], precision, say))
        except ConfigurationError as error:
            measured.append(Measured(precision, why_not=str(error)))
    best = choose(measured)
    for line in _table(measured, best, settings.model_backend):
        say(line)
    return ready[best.precision]


async def _ready(
    settings: ProcessorSettings, precision: Precision, buckets: Sequence[str], say: Callable[[str], None]
) -> ProcessorSettings:
    settings = settings.model_copy(update={"model_precision": precision})
    if precision != "int8":
        return settings
    if settings.model_backend == "torch":
        raise ConfigurationError("it runs on OpenVINO only")
    if importlib.util.find_spec("nncf") is None:
        raise ConfigurationError("it is calibrated by nncf, which is not installed: pip install 'image-search[training]'")
    return await _calibrated(settings, buckets, say, only_own=True)


async def _calibrated(
    settings: ProcessorSettings, buckets: Sequence[str], say: Callable[[str], None], *, only_own: bool = False
) -> ProcessorSettings:
    if settings.calibration_sha256:
        return settings
    digest = await gather(chosen(settings), settings, buckets, say, only_own=only_own)
    return settings.model_copy(update={"calibration_sha256": digest})


async def _measure(settings: ProcessorSettings, precision: Precision, say: Callable[[str], None]) -> Measured:
    description = chosen(settings)
    embedder = await open_embedder(description, settings, say)
    try:
        cosine = await check_golden(embedder, description)
        pixels = _noise(description, PICTURES_ON_A_GPU if uses_gpu(settings) else PICTURES_AT_ONCE)
        rates: list[float] = []
        end = time.perf_counter() + MEASURE_SECONDS
        while not rates or time.perf_counter() < end:
            began = time.perf_counter()
            await embedder.embed(pixels)
            rates.append(len(pixels) / (time.perf_counter() - began))
    finally:
        await embedder.close()
    # What else runs makes single calls slower, never faster.
    return Measured(precision, max(rates), cosine)


def _noise(description: ModelDescription, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, *description.input_size, 3), dtype=np.uint8)


def _table(measured: Sequence[Measured], best: Measured, backend: str) -> list[str]:
    lines = [f"IMAGE_SEARCH_MODEL_PRECISION=auto, on this host, {backend}:"]
    for one in measured:
        if one.pictures_per_second is None:
            lines.append(f"  {one.precision}  not here: {one.why_not}")
        else:
            cosine = "" if one.golden_cosine is None else f"  golden vectors {one.golden_cosine:.4f}"
            chosen_one = "  <- chosen, and kept" if one is best else ""
            lines.append(f"  {one.precision}  {one.pictures_per_second:7.1f} pictures a second{cosine}{chosen_one}")
    return lines
