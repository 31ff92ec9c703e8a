"""The index: recall@10 against exact search and the rate of our adapter beside bare pymilvus, on sealed and on growing data.

python -m tests.benchmarks --only index [--rows N]: this alone, on a stack of its own.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt
from pymilvus import AsyncMilvusClient  # type: ignore[import-untyped]  # it has no types

from infra import vector_store
from infra.settings import CommonSettings
from infra.vector_store import VectorStore
from infra.vector_store.index import VectorIndex
from schemas.identity import ObjectId, ObjectRef, content_hash_of
from schemas.vectors import Vector, VectorRow
from tests.benchmarks.parts import Run
from tests.benchmarks.report import Result, ratio

ROWS, QUICK_ROWS, DIMENSION = 100_000, 5_000, 512
CENTRES, SPREAD = 2_000, 0.6
"""Pictures come in kinds: a vector is a centre and some noise of its own, on the whole as long as `SPREAD` of it."""
QUERIES, NEIGHBOURS = 200, 10
ROUNDS, SEARCHES = 6, 50
WRITTEN_AT_ONCE = 2_000
SEALED_SECONDS = 300.0
RECALL_GOAL, RATE_GOAL = 0.99, 0.95

Matrix = npt.NDArray[np.float32]
Search = Callable[[Vector], Awaitable[object]]


def clustered(rows: int, seed: int) -> Matrix:
    """Unit vectors around the same centres, whatever the seed."""
    centres = np.random.default_rng(1).standard_normal((CENTRES, DIMENSION), dtype=np.float32)
    dice = np.random.default_rng(seed)
    vectors: Matrix = centres[dice.integers(0, CENTRES, rows)]
    vectors += SPREAD * dice.standard_normal((rows, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def nearest(stored: Matrix, queries: Matrix) -> list[set[int]]:
    """One query at a time: the similarities of all of them would be a matrix of their own."""
    return [set(np.argpartition(stored @ query, -NEIGHBOURS)[-NEIGHBOURS:].tolist()) for query in queries]


async def measure(settings: CommonSettings, say: Callable[[str], None], rows: int = ROWS) -> list[Result]:
    """On a collection of its own beside ours, removed at the end."""
    store = await vector_store.connect(settings)
    client = AsyncMilvusClient(settings.milvus_uri, token=settings.milvus_token.get_secret_value(), dedicated=True)
    name = f"{settings.milvus_collection_prefix}benchmark_index_{secrets.token_hex(4)}"
    stored, queries = clustered(rows, 2), clustered(QUERIES, 3)
    truth = nearest(stored, queries)
    try:
        await store.create_collection(name, dimension=DIMENSION)
        numbers = await _write(store, name, stored, say)
        results = []
        await _until_all_are_seen(store, name, rows)
        for state in ("growing", "sealed"):
            if state == "sealed":
                await _seal(client, name, rows)
            found = [{numbers[hit.object_id] for hit in await store.search(name, query, limit=NEIGHBOURS)} for query in queries]
            recall = sum(len(right & ours) for right, ours in zip(truth, found, strict=True)) / (NEIGHBOURS * QUERIES)
            rates = await _rates(store, client, name, queries, VectorIndex.from_settings(settings))
            bare = statistics.median(rate for _, rate in rates)
            say(f"index, {state}: recall@10 {recall:.4f}, bare pymilvus {bare:.0f} searches a second")
            where = f"{rows:,} × {DIMENSION}, {state}"
            results += [
                Result(f"recall@10, {where}", recall, RECALL_GOAL, "", at_least=True),
                ratio(
                    f"search over bare pymilvus, {where}",
                    RATE_GOAL,
                    {"ours": [one for one, _ in rates], "bare": [one for _, one in rates]},
                ),
            ]
        return results
    finally:
        await client.drop_collection(name)
        await client.close()
        await store.close()


async def _write(store: VectorStore, name: str, stored: Matrix, say: Callable[[str], None]) -> dict[ObjectId, int]:
    numbers: dict[ObjectId, int] = {}
    started = time.perf_counter()
    for start in range(0, len(stored), WRITTEN_AT_ONCE):
        rows = []
        for number in range(start, min(start + WRITTEN_AT_ONCE, len(stored))):
            ref = ObjectRef("benchmark", f"{number}.jpg")
            numbers[ref.object_id] = number
            rows.append(VectorRow(ref.object_id, stored[number], ref, content_hash_of(ref.key.encode()), 0, 1, 1, 1, "jpeg"))
        await store.upsert(name, rows)
    say(f"index: {len(stored):,} vectors written in {time.perf_counter() - started:.1f} s")
    return numbers


async def _until_all_are_seen(store: VectorStore, name: str, rows: int) -> None:
    async with asyncio.timeout(SEALED_SECONDS):
        while await store.count(name) < rows:
            await asyncio.sleep(0.5)


async def _seal(client: AsyncMilvusClient, name: str, rows: int) -> None:
    """All data in segments with an index, and those loaded: until then a sealed segment is searched without one."""
    await client.flush(name, timeout=SEALED_SECONDS)
    async with asyncio.timeout(SEALED_SECONDS):
        while True:
            state = await client.describe_index(name, "vector")
            if state["state"] == "Finished" and state["indexed_rows"] >= rows and not state["pending_index_rows"]:
                break
            await asyncio.sleep(0.5)
    await client.refresh_load(name, timeout=SEALED_SECONDS)


async def _rates(
    store: VectorStore, client: AsyncMilvusClient, name: str, queries: Matrix, index: VectorIndex
) -> list[tuple[float, float]]:
    """Searches a second, ours and bare, the same request in both; alternating, and who begins alternates, too."""

    async def ours(vector: Vector) -> object:
        return await store.search(name, vector, limit=NEIGHBOURS)

    async def bare(vector: Vector) -> object:
        return await client.search(
            name,
            [vector],
            limit=NEIGHBOURS,
            output_fields=["content_hash"],
            search_params={"metric_type": "COSINE", "params": {"ef": index.effort(NEIGHBOURS)}},
            anns_field="vector",
            consistency_level="Bounded",
        )

    rates = []
    for number in range(-1, ROUNDS):
        if number % 2:
            first, second = await _rate(bare, queries), await _rate(ours, queries)
            pair = (second, first)
        else:
            pair = (await _rate(ours, queries), await _rate(bare, queries))
        if number >= 0:  # the round before the first warms both
            rates.append(pair)
    return rates


async def _rate(search: Search, queries: Matrix) -> float:
    started = time.perf_counter()
    for query in queries[:SEARCHES]:
        await search(query)
    return SEARCHES / (time.perf_counter() - started)


def part(run: Run) -> list[Result]:
    with run.stack() as stack:
        return asyncio.run(measure(stack.settings(CommonSettings), run.say, run.rows or run.of(ROWS, QUICK_ROWS)))
