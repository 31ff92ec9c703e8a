"""A backlog of puts until it is searchable against the bare model of the same precision, and searches on the same stack."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Final

from tests.benchmarks import measures, queries
from tests.benchmarks.parts import Run
from tests.benchmarks.random_weights import resnet50_variables
from tests.benchmarks.report import Result
from tests.benchmarks.services import QUICK_BACKLOG, beside
from tests.pictures import edited_copy, jpeg
from tests.stack import FullStack

GOALS: Final = {"fp32": 0.95, "bf16": 0.92, "int8": 0.87}
BACKLOGS: Final = {"fp32": 400, "bf16": 1000, "int8": 2000}
SERVERS: Final = frozenset({"weed", "minio", "kafka", "milvus", "mariadbd"})
"""Programs of the stack that are not ours, as FullStack.cpu_seconds names them."""


def part(run: Run) -> list[Result]:
    results = []
    for precision in GOALS:
        with tempfile.TemporaryDirectory(prefix="image-search-bench-") as folder:
            variables = {**resnet50_variables(Path(folder)), "IMAGE_SEARCH_MODEL_PRECISION": precision}
            with run.stack(**variables) as stack:
                results += asyncio.run(_measure(run, stack, variables, precision))
    return results


async def _measure(run: Run, stack: FullStack, variables: dict[str, str], precision: str) -> list[Result]:
    what = f"resnet50 {precision}"
    async with beside(stack, variables) as here:
        before = await here.model_rate()
        filled = await measures.backlog(here.bench, run.say, run.of(BACKLOGS[precision], QUICK_BACKLOG))
        after = await here.model_rate()
        run.cpu_seconds[f"CPU-seconds of the backlog, {what}, by process"] = filled.cpu_seconds
        pictures = [edited_copy(jpeg(number)) for number in range(run.of(measures.SEARCHES, 10))]
        searches = await queries.overhead(here.bench, here.search, pictures, run.say, what)
        return ratios(what, GOALS[precision], filled, before, after) + searches


def ratios(what: str, goal: float, filled: measures.Backlog, before: float, after: float) -> list[Result]:
    """By the wall, and of the processor time that the servers left. `before`, `after`: rates of the bare model."""
    by_wall = filled.rate / ((before + after) / 2)
    there = (os.cpu_count() or 1) * filled.seconds
    left = 1 - sum(seconds for name, seconds in filled.cpu_seconds.items() if name in SERVERS) / there
    arms = {"pipeline": [filled.rate], "bare before": [before], "bare after": [after]}
    name = f"backlog over bare model, {what}"
    return [
        Result(f"{name}, wall", by_wall, goal, "×", at_least=True, arms=arms),
        Result(f"{name}, of what the servers left", by_wall / left, goal, "×", at_least=True, arms=arms),
    ]
