"""What is measured on a running stack. Each measure has its bare arm in the same run, alternating with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from infra import object_store
from infra.settings import CommonSettings
from schemas.identity import ObjectRef
from tests.benchmarks.report import Result, percentile
from tests.pictures import jpeg
from tests.stack import FullStack

PUTS = 200
BACKLOG = 2000
SEARCHES = 150
SEARCH_LIMIT = 20
PUT_CONCURRENCY = 8
LONGEST_WAIT_SECONDS = 600.0
LONGEST_FRESH_SECONDS = 30.0
POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Bench:
    stack: FullStack
    settings: CommonSettings
    session: aiohttp.ClientSession

    @property
    def bucket(self) -> str:
        return self.settings.buckets[0]

    async def search(self, picture: bytes, limit: int) -> list[str]:
        """Keys of the hits, best first."""
        url = f"{self.stack.query_url}/v1/search?limit={limit}"
        async with self.session.post(url, data=picture, headers={"Content-Type": "image/jpeg"}) as response:
            response.raise_for_status()
            return [hit["key"] for hit in (await response.json())["hits"]]

    async def until_first(self, key: str, picture: bytes) -> None:
        """Search until this key comes first."""
        async with asyncio.timeout(LONGEST_FRESH_SECONDS):
            while (await self.search(picture, 1))[:1] != [key]:
                await asyncio.sleep(POLL_SECONDS)

    async def indexed(self) -> int:
        async with self.session.get(f"{self.stack.query_url}/v1/status") as response:
            response.raise_for_status()
            return int((await response.json())["images"]["indexed"])


@dataclass(frozen=True, slots=True)
class FreshnessGoals:
    """`where` ends the names of the results."""

    where: str
    p50_seconds: float
    p99_seconds: float


async def freshness(bench: Bench, say: Callable[[str], None], goals: FreshnessGoals, puts: int = PUTS) -> list[Result]:
    """From the end of a PUT to the first search with that picture which returns it first, one put after another."""
    store = await object_store.connect(bench.settings)
    waits: list[float] = []
    try:
        for number in range(puts):
            key, picture = f"fresh/{number:04}.jpg", jpeg(100_000 + number)
            await store.put(ObjectRef(bench.bucket, key), picture, "image/jpeg")
            started = time.perf_counter()
            await bench.until_first(key, picture)
            waits.append(time.perf_counter() - started)
    finally:
        await store.close()
    say(f"freshness{goals.where}: {len(waits)} puts")
    return [
        Result(f"put to searchable p50{goals.where}", percentile(waits, 0.5), goals.p50_seconds, "s", rounds=waits),
        Result(f"put to searchable p99{goals.where}", percentile(waits, 0.99), goals.p99_seconds, "s"),
    ]


@dataclass(frozen=True, slots=True)
class Backlog:
    rate: float
    seconds: float
    cpu_seconds: dict[str, float]


async def backlog(bench: Bench, say: Callable[[str], None], count: int = BACKLOG) -> Backlog:
    """Distinct pictures put as fast as the store takes them, until the last of them is found by a search."""
    pictures = [jpeg(number) for number in range(count)]
    store = await object_store.connect(bench.settings)
    before, cpu_before = await bench.indexed(), bench.stack.cpu_seconds()
    places = asyncio.Semaphore(PUT_CONCURRENCY)

    async def put(number: int) -> None:
        async with places:
            await store.put(ObjectRef(bench.bucket, f"backlog/{number:05}.jpg"), pictures[number], "image/jpeg")

    started = time.perf_counter()
    try:
        await asyncio.gather(*(put(number) for number in range(count)))
    finally:
        await store.close()
    put_seconds = time.perf_counter() - started
    while await bench.indexed() < before + count:
        if time.perf_counter() - started > LONGEST_WAIT_SECONDS:
            raise TimeoutError(f"{await bench.indexed() - before} of {count} pictures were indexed in time")
        await asyncio.sleep(0.1)
    await bench.until_first(f"backlog/{count - 1:05}.jpg", pictures[-1])
    seconds = time.perf_counter() - started
    cpu_after = bench.stack.cpu_seconds()
    say(f"backlog: {count} pictures in {seconds:.1f} s (all put after {put_seconds:.1f} s)")
    return Backlog(count / seconds, seconds, {name: cpu_after[name] - cpu_before.get(name, 0.0) for name in cpu_after})
