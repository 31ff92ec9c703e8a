"""`make bench`: both arms of each measure in one run on one machine, raw rounds kept. Never part of the tests."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from rich.console import Console

from infra import metadata_store, vector_store
from infra.settings import ProcessorSettings
from processors.embedding import open_embedder
from processors.embedding.active_model import active_model
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen, precision_asked
from tests.benchmarks import bare, index, instead, measures, queries
from tests.benchmarks.report import Result, publish
from tests.pictures import edited_copy, jpeg
from tests.stack import FullStack

MEMORY_GOAL_GIB = 4.0
EFFICIENCY_GOAL = 0.3
BARE_PICTURES = 64
EMBEDDED_GOALS = measures.FreshnessGoals("", p50_seconds=0.7, p99_seconds=2.0)
FULL_GOALS = measures.FreshnessGoals(", full profile", p50_seconds=0.5, p99_seconds=1.5)


async def embedded(stack: FullStack, console: Console) -> tuple[list[Result], dict[str, float]]:
    """Every measure; beside the results the CPU seconds of each program during the backlog."""
    settings = stack.settings(ProcessorSettings)
    metadata, vectors = await metadata_store.connect(settings), await vector_store.connect(settings)
    description = chosen(settings)
    model = await active_model(metadata, fingerprint(description, precision_asked(settings)), description.name)
    embedder = await open_embedder(description, settings)
    try:
        rules = description.decode_rules(settings)
        pixels = bare.pixels_of([jpeg(number) for number in range(BARE_PICTURES)], rules)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            bench = measures.Bench(stack, settings, session)
            results = await measures.freshness(bench, console.print, EMBEDDED_GOALS)
            before, by_batch = await bare.model_rate(embedder, pixels)
            filled = await measures.backlog(bench, console.print)
            after, _ = await bare.model_rate(embedder, pixels)
            bare_rate = (before + after) / 2
            console.print(f"bare model: {before:.0f} and {after:.0f} pictures a second, by batch size {_rounded(by_batch)}")
            results.append(
                Result(
                    "backlog over bare model",
                    filled.rate / bare_rate,
                    EFFICIENCY_GOAL,
                    "×",
                    at_least=True,
                    rounds=[filled.rate, before, after],
                )
            )
            pictures = [edited_copy(jpeg(number)) for number in range(measures.SEARCHES)]
            search = bare.BareSearch(rules, embedder, vectors, model.collection)
            results += await queries.overhead(bench, search, pictures, console.print)
            results += await queries.throughput(bench, console.print)
            results += await queries.refusals(bench, console.print)
        memory = stack.resident_bytes()
        results.append(Result("resident memory, all processes", sum(memory.values()) / 2**30, MEMORY_GOAL_GIB, "GiB"))
        with_torch = stack.processes_with("libtorch")
        results.append(Result("serving processes with torch", len(with_torch), 0, "processes"))
        results += await index.measure(settings, console.print)
        return results, filled.cpu_seconds
    finally:
        await embedder.close()
        await vectors.close()
        await metadata.close()


def _rounded(rates: dict[int, float]) -> dict[int, int]:
    return {batch: round(rate) for batch, rate in rates.items()}


async def full(stack: FullStack, console: Console) -> list[Result]:
    """What differs between the profiles: the way from the bucket through MinIO's notifications and MariaDB."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        bench = measures.Bench(stack, stack.settings(ProcessorSettings), session)
        return await measures.freshness(bench, console.print, FULL_GOALS)


def main() -> None:
    console = Console()
    with _running("embedded") as stack:
        results, cpu_seconds = asyncio.run(embedded(stack, console))
    with _running("full") as stack:
        results += asyncio.run(full(stack, console))
    for precision in instead.INGEST_GOALS:
        results += instead.run(precision, console.print)
    publish(results, cpu_seconds, console)


@contextmanager
def _running(profile: str) -> Iterator[FullStack]:
    with (
        tempfile.TemporaryDirectory(prefix="image-search-bench-") as folder,
        FullStack.running(Path(folder), arguments=("--profile", profile)) as stack,
    ):
        yield stack


if __name__ == "__main__":
    main()
