"""The bare model against a plain loop in torch on the same cores, in ResNet50's shape with random weights."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from infra.errors import ConfigurationError
from infra.settings import ENV_PREFIX, ProcessorSettings, load
from processors.embedding import open_embedder
from processors.embedding.choice import chosen
from processors.embedding.embedder import Embedder, Pixels
from processors.embedding.fastest import decided
from processors.embedding.network import load_network
from tests.benchmarks.parts import Run
from tests.benchmarks.random_weights import resnet50_variables
from tests.benchmarks.report import Result, ratio

GOALS: Final = {"fp32": 1.5, "bf16": 2.5, "int8": 5.0}
BATCH: Final = 32


def measure(run: Run) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="image-search-bench-") as folder:
        return asyncio.run(_measure(run, Path(folder)))


async def _measure(run: Run, folder: Path) -> list[Result]:
    variables = resnet50_variables(folder)
    results = []
    plain = _PlainLoop(variables)
    for precision in GOALS:
        try:
            embedder = await _opened(variables, precision, folder, run.say)
        except ConfigurationError as error:
            run.say(f"resnet50 {precision} is left out: {error}")
            continue
        try:
            arms = await _in_turn(embedder, plain, rounds=run.of(5, 2), seconds=run.of(4, 1))
        finally:
            await embedder.close()
        name = f"bare model, resnet50 {precision}: ours over torch fp32, one picture at a time"
        results.append(ratio(name, GOALS[precision], arms))
    return results


def settings_of(variables: dict[str, str], precision: str, folder: Path) -> ProcessorSettings:
    """Settings as a service gets them from these variables, with a cache of its own."""
    given: dict[str, Any] = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in variables.items()}
    return load(ProcessorSettings, **given, model_precision=precision, cache_dir=folder / "cache")


async def _opened(variables: dict[str, str], precision: str, folder: Path, say: Callable[[str], None]) -> Embedder:
    settings = await decided(settings_of(variables, precision, folder), [], say)
    return await open_embedder(chosen(settings), settings, say)


class _PlainLoop:
    """What one writes first: fp32, one picture at a time."""

    def __init__(self, variables: dict[str, str]) -> None:
        path = variables[f"{ENV_PREFIX}OWN_WEIGHTS"]
        settings = settings_of(variables, "fp32", Path(path).parent)
        self._network = load_network(chosen(settings), Path(path))

    def rate(self, pixels: Pixels, threads: int, seconds: float) -> float:
        torch.set_num_threads(threads)
        started, done = time.perf_counter(), 0
        with torch.inference_mode():
            while time.perf_counter() - started < seconds:
                self._network(torch.from_numpy(pixels[done % len(pixels)][None]))
                done += 1
        return done / (time.perf_counter() - started)


async def _in_turn(embedder: Embedder, plain: _PlainLoop, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    height, width = embedder.input_size
    pixels = np.random.default_rng(1).integers(0, 256, (BATCH, height, width, 3), dtype=np.uint8)
    arms: dict[str, list[float]] = {"ours": [], "torch": []}
    for number in range(rounds):
        for name in ("ours", "torch") if number % 2 else ("torch", "ours"):
            if name == "ours":
                arms[name].append(await _our_rate(embedder, pixels, seconds))
            else:
                # The better of both: torch's threads wait for each other by spinning, and where something else runs on the
                # same cores, all of them were seen to be ten times as slow as one.
                arms[name].append(max(plain.rate(pixels[:4], threads, seconds) for threads in {1, os.cpu_count() or 1}))
    return arms


async def _our_rate(embedder: Embedder, pixels: Pixels, seconds: float) -> float:
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        await embedder.embed(pixels)
        done += len(pixels)
    return done / (time.perf_counter() - started)
