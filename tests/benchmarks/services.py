"""The services as they are set up by default: freshness, a backlog, searches, memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp

from infra import metadata_store, vector_store
from infra.settings import ENV_PREFIX, ProcessorSettings, load
from processors.embedding import open_embedder
from processors.embedding.active_model import active_model, settled
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.embedder import Embedder, Pixels
from tests.benchmarks import bare, measures, queries
from tests.benchmarks.parts import Run
from tests.benchmarks.report import Result
from tests.pictures import edited_copy, jpeg
from tests.stack import FullStack

MEMORY_GOAL_GIB: Final = 4.0
EFFICIENCY_GOAL: Final = 0.3
RATE_GOAL: Final = 150.0
BARE_PICTURES: Final = 64
QUICK_BACKLOG: Final = 64
EMBEDDED_GOALS: Final = measures.FreshnessGoals("", p50_seconds=0.7, p99_seconds=2.0)
FULL_GOALS: Final = measures.FreshnessGoals(", full profile", p50_seconds=0.5, p99_seconds=1.5)


@dataclass(frozen=True, slots=True)
class BesideAStack:
    """A running stack and, in this process, what its services use: the same model, the same collection."""

    model: str
    bench: measures.Bench
    embedder: Embedder
    pixels: Pixels
    search: bare.BareSearch

    async def model_rate(self) -> float:
        rate, _ = await bare.model_rate(self.embedder, self.pixels)
        return rate


@asynccontextmanager
async def beside(stack: FullStack, variables: dict[str, str] | None = None) -> AsyncIterator[BesideAStack]:
    """`variables`: what the stack was told by its environment, which is in no file of it."""
    own = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in (variables or {}).items()}
    told = load(ProcessorSettings, state_dir=stack.state_dir, **own)
    metadata, vectors = await metadata_store.connect(told), await vector_store.connect(told)
    try:
        settings = await settled(told, metadata)
        description = chosen(settings)
        model = await active_model(metadata, fingerprint(description, precision_asked(settings)), description.name)
        rules = description.decode_rules(settings)
        pixels = bare.pixels_of([jpeg(number) for number in range(BARE_PICTURES)], rules)
        embedder = await open_embedder(description, settings)
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
                search = bare.BareSearch(rules, embedder, vectors, model.collection)
                yield BesideAStack(description.name, measures.Bench(stack, settings, session), embedder, pixels, search)
        finally:
            await embedder.close()
    finally:
        await vectors.close()
        await metadata.close()


def embedded_profile(run: Run) -> list[Result]:
    with run.stack("embedded") as stack:
        return asyncio.run(_embedded(run, stack))


def full_profile(run: Run) -> list[Result]:
    """What differs between the profiles: the way from the bucket through MinIO's notifications and MariaDB."""
    with run.stack("full") as stack:
        return asyncio.run(_full(run, stack))


async def _embedded(run: Run, stack: FullStack) -> list[Result]:
    async with beside(stack) as here:
        bench = here.bench
        results = await measures.freshness(bench, run.say, EMBEDDED_GOALS, run.of(measures.PUTS, 10))
        before = await here.model_rate()
        filled = await measures.backlog(bench, run.say, run.of(measures.BACKLOG, QUICK_BACKLOG))
        after = await here.model_rate()
        run.cpu_seconds["CPU-seconds of the backlog, by process"] = filled.cpu_seconds
        arms = {"pipeline": [filled.rate], "bare before": [before], "bare after": [after]}
        mean = (before + after) / 2
        results += [
            Result("backlog over bare model", filled.rate / mean, EFFICIENCY_GOAL, "×", at_least=True, arms=arms),
            Result("backlog, all servers on the same cores", filled.rate, RATE_GOAL, "pictures/s", at_least=True),
        ]
        pictures = [edited_copy(jpeg(number)) for number in range(run.of(measures.SEARCHES, 10))]
        results += await queries.overhead(bench, here.search, pictures, run.say, here.model)
        results += await queries.throughput(bench, run.say, run.of(queries.ROUNDS, 1))
        results += await queries.refusals(bench, run.say)
    memory = stack.resident_bytes()
    results.append(Result("resident memory, all processes", sum(memory.values()) / 2**30, MEMORY_GOAL_GIB, "GiB"))
    with_torch = stack.processes_with("libtorch")
    results.append(Result("serving processes with torch", len(with_torch), 0, "processes"))
    return results


async def _full(run: Run, stack: FullStack) -> list[Result]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        bench = measures.Bench(stack, stack.settings(ProcessorSettings), session)
        return await measures.freshness(bench, run.say, FULL_GOALS, run.of(measures.PUTS, 10))
