"""Decoding against what else one could write, in one thread, and what the processes around it add."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import psutil
import simplejpeg  # type: ignore[import-untyped]  # the package brings no types
from PIL import Image

from infra.settings import ProcessorSettings
from processors.decode import decode
from processors.decode_pool import PICTURES_A_TASK, DecodePool
from processors.embedding import open_embedder
from processors.embedding.choice import chosen
from processors.embedding.embedder import Pixels, Vectors
from processors.raster import DecodeRules
from tests.benchmarks.parts import Run
from tests.benchmarks.report import Result, ratio
from tests.pictures import jpeg

SMALL: Final = (500, 400)
LARGE: Final = ((1920, 1080), (2000, 1500), (4000, 3000))
FUNCTION_GOAL: Final = 0.95
POOL_GOAL: Final = 1.15
LARGE_GOAL: Final = 2.0
COSINE_GOAL: Final = 0.995

Decoder = Callable[[bytes], object]


def measure(run: Run) -> list[Result]:
    settings = ProcessorSettings()
    rules = chosen(settings).decode_rules(settings)
    small = [jpeg(number, SMALL) for number in range(run.of(64, 16))]
    rounds = run.of(11, 3)

    def ours(data: bytes) -> object:
        return decode(data, rules)

    arms = in_turn({"ours": ours, "simplejpeg": lambda data: by_simplejpeg(data, rules)}, small, rounds)
    results = [ratio("decode 500×400: ours over simplejpeg and resize, one thread", FUNCTION_GOAL, arms)]
    results.append(asyncio.run(_pool(small, rules, rounds)))
    for size in LARGE:
        pictures = [jpeg(number, size) for number in range(run.of(6, 2))]
        arms = in_turn({"ours": ours, "Pillow": lambda data: by_pillow(data, rules)}, pictures, run.of(5, 2))
        results.append(ratio(f"decode {size[0]}×{size[1]}: ours over the whole picture by Pillow", LARGE_GOAL, arms))
    results.append(asyncio.run(_agreement(settings, run.of(6, 2))))
    return results


def in_turn(arms: Mapping[str, Decoder], pictures: Sequence[bytes], rounds: int) -> dict[str, list[float]]:
    """Pictures a CPU-second of each arm, round by round; which comes first changes with every round.

    CPU-seconds, because these arms only compute: what else runs on the machine then costs no accuracy.
    """
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms) if number % 2 else reversed(list(arms)):
            started = time.process_time()
            for picture in pictures:
                arms[name](picture)
            # The first round only warms up.
            if number:
                rates[name].append(len(pictures) / (time.process_time() - started))
    return rates


def by_simplejpeg(data: bytes, rules: DecodeRules) -> Pixels:
    """The loop that we are held to: the fastest decoder of JPEGs that is well kept, and the same filter."""
    return _middle(Image.fromarray(simplejpeg.decode_jpeg(data)), rules)


def by_pillow(data: bytes, rules: DecodeRules) -> Pixels:
    """All of the picture decoded, then scaled."""
    return _middle(Image.open(io.BytesIO(data)).convert("RGB"), rules)


def _middle(image: Image.Image, rules: DecodeRules) -> Pixels:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((rules.width, rules.height), Image.Resampling.BICUBIC, box))


async def _pool(pictures: Sequence[bytes], rules: DecodeRules, rounds: int) -> Result:
    """One process of the pool against the function here, CPU-seconds of all processes, tasks of full size."""
    pool = DecodePool(rules, workers=1)
    await pool.start()
    batches = [pictures[start : start + PICTURES_A_TASK] for start in range(0, len(pictures), PICTURES_A_TASK)]
    arms: dict[str, list[float]] = {"pool": [], "function": []}
    try:
        for number in range(rounds + 1):
            before = _all_cpu_seconds()
            for batch in batches:
                await pool.decode(batch)
            between = _all_cpu_seconds()
            for picture in pictures:
                decode(picture, rules)
            after = _all_cpu_seconds()
            if number:
                arms["pool"].append(1000 * (between - before) / len(pictures))
                arms["function"].append(1000 * (after - between) / len(pictures))
    finally:
        await pool.close()
    return ratio("decode 500×400: CPU of the pool over the function", POOL_GOAL, arms, at_least=False)


def _all_cpu_seconds() -> float:
    this = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (this, *this.children(recursive=True)))


async def _agreement(settings: ProcessorSettings, count: int) -> Result:
    """The least cosine between the vectors of our pixels and of those by Pillow from the whole picture."""
    description = chosen(settings)
    rules = description.decode_rules(settings)
    pictures = [jpeg(number, size) for size in (SMALL, *LARGE) for number in range(count)]
    embedder = await open_embedder(description, settings)
    try:
        ours = await embedder.embed(np.stack([decode(picture, rules).pixels for picture in pictures]))
        reference = await embedder.embed(np.stack([by_pillow(picture, rules) for picture in pictures]))
    finally:
        await embedder.close()
    cosines = _cosines(ours, reference)
    return Result("decode: least cosine to the whole picture by Pillow", min(cosines), COSINE_GOAL, "", True, cosines)


def _cosines(ones: Vectors, others: Vectors) -> list[float]:
    return [float(cosine) for cosine in np.sum(ones * others, axis=1)]
