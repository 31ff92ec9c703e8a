"""Searches: what the service adds to the bare work, what it answers to many at once, and how soon it says that it is full."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import psutil

from infra.settings import QuerySettings
from tests.benchmarks.bare import BareSearch
from tests.benchmarks.measures import SEARCH_LIMIT, Bench
from tests.benchmarks.report import Result, percentile
from tests.pictures import edited_copy, jpeg

ADDED_GOAL_MILLISECONDS = 4.0
P50_GOAL, P99_GOAL = 1.05, 1.15
"""Of ResNet50 in fp32, which takes long enough for a ratio to say something."""

CLIENTS = 16
SEARCHING = ("serve", "milvus")
ROUNDS = 3
ROUND_SECONDS = 4.0
OF_PROCESSORS_GOAL, OF_ONE_CLIENT_GOAL = 0.9, 1.3

REFUSALS = 100
REFUSAL_GOAL_SECONDS = 0.05
FULL_SECONDS = 60.0


class Pictures:
    """Pictures that no search has had yet: what the service remembers of a picture would be no measure of it."""

    def __init__(self) -> None:
        self._drawn = [edited_copy(jpeg(200_000 + number)) for number in range(32)]
        self._numbers = itertools.count()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        number = next(self._numbers)
        # What follows the end of a JPEG changes its hash and not one pixel.
        return self._drawn[number % len(self._drawn)] + number.to_bytes(8)


async def overhead(
    bench: Bench, bare: BareSearch, pictures: Sequence[bytes], say: Callable[[str], None], where: str
) -> list[Result]:
    """One client, nothing else to do: the answer over HTTP against decode, embed and search in one process, in turn.

    `where`: the model, in the names of the results.
    """
    ours: list[float] = []
    theirs: list[float] = []

    async def service(picture: bytes) -> None:
        started = time.perf_counter()
        await bench.search(picture, SEARCH_LIMIT)
        ours.append(time.perf_counter() - started)

    async def in_process(picture: bytes) -> None:
        theirs.append(await bare.seconds(picture, SEARCH_LIMIT))

    for number, picture in enumerate(pictures):
        for arm in (service, in_process) if number % 2 else (in_process, service):
            await arm(picture)
    p50, p99 = (percentile(ours, share) / percentile(theirs, share) for share in (0.5, 0.99))
    added = 1000 * (percentile(ours, 0.5) - percentile(theirs, 0.5))
    say(f"search: p50 {1000 * percentile(ours, 0.5):.1f} ms, bare {1000 * percentile(theirs, 0.5):.1f} ms")
    name = f"decode + embed + bare search, {where}"
    arms = {"ours, ms": [1000 * value for value in ours], "bare, ms": [1000 * value for value in theirs]}
    return [
        Result(f"search above {name}, p50", added, ADDED_GOAL_MILLISECONDS, "ms", arms=arms),
        Result(f"search over {name}, p50", p50, P50_GOAL, "×", arms=arms),
        Result(f"search over {name}, p99", p99, P99_GOAL, "×", arms=arms),
    ]


@dataclass(frozen=True, slots=True)
class _Round:
    """`cpu_seconds`: of one search, by all that takes part in it: the service, the vector store, and this client."""

    rate: float
    cpu_seconds: float


async def throughput(bench: Bench, say: Callable[[str], None], rounds: int = ROUNDS) -> list[Result]:
    """One client and many, in turn."""
    pictures = Pictures()
    one, many = [], []
    for _ in range(rounds):
        one.append(await _round(bench, pictures, clients=1))
        many.append(await _round(bench, pictures, clients=CLIENTS))
    rate_of_one, rate_of_many = (percentile([each.rate for each in arm], 0.5) for arm in (one, many))
    arms = {f"{CLIENTS} clients": [each.rate for each in many], "one client": [each.rate for each in one]}
    cpu_seconds = percentile([each.cpu_seconds for each in one], 0.5)
    processors = os.cpu_count() or 1
    say(
        f"searches a second: {rate_of_one:.0f} with one client, {rate_of_many:.0f} with {CLIENTS}; "
        f"CPU-seconds of one: {cpu_seconds:.4f} and {percentile([each.cpu_seconds for each in many], 0.5):.4f}"
    )
    return [
        Result(
            f"{CLIENTS} clients over what the processors allow",
            rate_of_many * cpu_seconds / processors,
            OF_PROCESSORS_GOAL,
            "×",
            at_least=True,
            arms=arms,
        ),
        Result(
            f"{CLIENTS} clients over one client",
            rate_of_many / rate_of_one,
            OF_ONE_CLIENT_GOAL,
            "×",
            at_least=True,
            arms=arms,
        ),
    ]


async def _round(bench: Bench, pictures: Pictures, *, clients: int) -> _Round:
    here = psutil.Process()
    answers = 0
    until = time.perf_counter() + ROUND_SECONDS

    async def client() -> None:
        nonlocal answers
        while time.perf_counter() < until:
            await bench.search(next(pictures), SEARCH_LIMIT)
            answers += 1

    def used() -> float:
        times = here.cpu_times()
        return sum(bench.stack.cpu_seconds()[program] for program in SEARCHING) + times.user + times.system

    before, started = used(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return _Round(answers / (time.perf_counter() - started), (used() - before) / answers)


async def refusals(bench: Bench, say: Callable[[str], None]) -> list[Result]:
    """As many clients as get in, and one more, which is refused: how long that takes, asked from a thread of its own."""
    settings = bench.stack.settings(QuerySettings)
    pictures, full = Pictures(), asyncio.Event()
    url = f"{bench.stack.query_url}/v1/search?limit={SEARCH_LIMIT}"

    async def client(session: aiohttp.ClientSession) -> None:
        while not full.is_set():
            async with session.post(url, data=next(pictures), headers={"Content-Type": "image/jpeg"}) as response:
                await response.read()
            if response.status == 429:
                await asyncio.sleep(0.01)

    clients = settings.queries_at_once + settings.queries_waiting + 8
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        crowd = [asyncio.create_task(client(session)) for _ in range(clients)]
        try:
            waits = await asyncio.to_thread(_refused, url, next(pictures))
        finally:
            full.set()
            await asyncio.gather(*crowd)
    say(f"refused beside {clients} clients: {len(waits)} times, p50 {1000 * percentile(waits, 0.5):.1f} ms")
    return [Result("429 under overload, p99", percentile(waits, 0.99), REFUSAL_GOAL_SECONDS, "s", rounds=waits)]


def _refused(url: str, picture: bytes) -> list[float]:
    """Seconds until each refusal. Raises TimeoutError when there are too few of them."""
    waits: list[float] = []
    give_up = time.monotonic() + FULL_SECONDS
    while len(waits) < REFUSALS:
        if time.monotonic() > give_up:
            raise TimeoutError(f"only {len(waits)} searches were refused in {FULL_SECONDS:g} s")
        request = urllib.request.Request(url, data=picture, headers={"Content-Type": "image/jpeg"})
        started = time.perf_counter()
        try:
            urllib.request.urlopen(request, timeout=FULL_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code != 429 or "Retry-After" not in error.headers:
                raise
            waits.append(time.perf_counter() - started)
            error.close()
        time.sleep(0.005)
    return waits
