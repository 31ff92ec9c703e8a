"""Which index suits the vectors that lie in a collection: recall against exact search, latency and memory of each, measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from infra.errors import ConfigurationError
from infra.progress import Progress
from infra.settings import CommonSettings
from infra.vector_store import VectorStore
from infra.vector_store.index import VectorIndex
from infra.vector_store.tuning import LEAST_ROWS, Matrix, Scratch, scratch_collection

NEIGHBOURS = 10
WARM_UP = 20
PAGE = 1000
AS_NEAR = 1e-5
"""Two pictures of equal content have one vector, and either is right; floats of two programs differ in the last digits."""
AS_FAST = 1.05
"""Two medians nearer than this cannot be told apart on a machine that does something else, too."""

LINKS = (16, 32)
SEARCH_EFFORTS = (32, 64, 128, 256)
SEARCH_LISTS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Sample:
    """`queries` are vectors of the collection, too, and not among `stored`: else each would find itself."""

    collection: str
    rows: int
    stored: Matrix
    queries: Matrix

    @property
    def whole(self) -> bool:
        return len(self.stored) + len(self.queries) >= self.rows


@dataclass(frozen=True, slots=True)
class Trial:
    index: VectorIndex
    recall: float
    p50_ms: float
    p99_ms: float
    memory_bytes: int
    """Of all rows of the collection, not of the sample."""
    build_seconds: float


@dataclass(frozen=True, slots=True)
class Tuning:
    sample: Sample
    goal: float
    trials: Sequence[Trial]
    recommended: Trial | None


async def tune(
    settings: CommonSettings, store: VectorStore, collection: str, *, rows: int, queries: int, goal: float, progress: Progress
) -> Tuning:
    """Reads the collection and writes none of it. `rows`: most vectors copied, beside the queries."""
    sample = await draw(store, collection, rows=rows, queries=queries, progress=progress)
    nearest = await asyncio.to_thread(exact, sample.stored, sample.queries)
    trials: list[Trial] = []
    async with scratch_collection(settings) as scratch:
        await scratch.fill(sample.stored, progress("copying vectors", len(sample.stored)))
        kinds = list(builds(len(sample.stored)))
        built = progress("building and searching", len(kinds))
        for index in kinds:
            trials += await _tried(scratch, index, sample, nearest)
            built(1)
    return Tuning(sample, goal, trials, recommend(trials, goal, whole=sample.whole))


async def draw(store: VectorStore, collection: str, *, rows: int, queries: int, progress: Progress) -> Sample:
    """The first rows by id are drawn by chance: an id is a hash. Raises ConfigurationError for too few of them."""
    total = await store.count(collection)
    wanted = min(total, rows + queries)
    if wanted < LEAST_ROWS + queries:
        raise ConfigurationError(
            f"{collection} has {total} vectors; with {queries} of them as queries, {LEAST_ROWS + queries} are needed. Below "
            "that Milvus builds no index and compares all vectors, which is exact"
        )
    read = progress("reading the collection", wanted)
    found: list[Matrix] = []
    after = None
    while len(found) < wanted:
        entries = await store.page(collection, after=after, limit=min(PAGE, wanted - len(found)))
        if not entries:
            break
        after = entries[-1].object_id
        stored = await store.fetch(collection, [entry.object_id for entry in entries])
        found += [row.vector for row in stored.values()]
        read(len(entries))
    if len(found) < LEAST_ROWS + queries:
        raise ConfigurationError(f"{collection} lost vectors while it was read; try again")
    vectors = np.stack(found)
    return Sample(collection, total, vectors[queries:], vectors[:queries])


def builds(rows: int) -> Iterator[VectorIndex]:
    """One for each thing that has to be built. Lists: about four times the root of the rows, as is usual, and a quarter."""
    yield VectorIndex(kind="FLAT")
    for links in LINKS:
        yield VectorIndex(kind="HNSW", links=links)
    many = 2 ** round(np.log2(4 * rows**0.5))
    for lists in (many // 4, many):
        yield VectorIndex(kind="IVF_FLAT", lists=lists)
    yield VectorIndex(kind="IVF_SQ8", lists=many // 4)


def searches(index: VectorIndex) -> Iterator[VectorIndex]:
    """The same index, searched with more and more effort."""
    match index.kind:
        case "HNSW":
            yield from (replace(index, search_effort=effort) for effort in SEARCH_EFFORTS)
        case "IVF_FLAT" | "IVF_SQ8":
            yield from (replace(index, search_lists=lists) for lists in SEARCH_LISTS if lists <= index.lists)
        case "FLAT":
            yield index


async def _tried(scratch: Scratch, index: VectorIndex, sample: Sample, nearest: Matrix) -> list[Trial]:
    started = time.perf_counter()
    await scratch.build(index)
    seconds = time.perf_counter() - started
    trials = []
    for search in searches(index):
        for query in sample.queries[:WARM_UP]:
            await scratch.search(query, search, NEIGHBOURS)
        found, taken = [], []
        for query in sample.queries:
            begun = time.perf_counter()
            found.append(await scratch.search(query, search, NEIGHBOURS))
            taken.append(1000 * (time.perf_counter() - begun))
        trials.append(
            Trial(
                search,
                recall(sample, nearest, found),
                float(np.percentile(taken, 50)),
                float(np.percentile(taken, 99)),
                search.memory_bytes(sample.rows, sample.stored.shape[1]),
                seconds,
            )
        )
    return trials


def exact(stored: Matrix, queries: Matrix) -> Matrix:
    """For each query the similarity of its last neighbour: what is as near as that is right."""
    return np.array([np.partition(stored @ query, -NEIGHBOURS)[-NEIGHBOURS] for query in queries], np.float32)


def recall(sample: Sample, nearest: Matrix, found: Sequence[Sequence[int]]) -> float:
    """Share of the true neighbours that were found, a row twice counted once."""
    right = 0
    for query, least, numbers in zip(sample.queries, nearest, found, strict=True):
        distinct = sorted(set(numbers))
        right += int(np.sum(sample.stored[distinct] @ query >= least - AS_NEAR))
    return right / (NEIGHBOURS * len(found))


def recommend(trials: Sequence[Trial], goal: float, *, whole: bool) -> Trial | None:
    """The fastest that reaches the goal; of those that are as fast, the one that finds the most, then the smallest.

    Exact search takes longer with each row, so it is out where only a part of the rows was tried. None: nothing is good enough.
    """
    good = [trial for trial in trials if trial.recall >= goal and (whole or trial.index.kind != "FLAT")]
    if not good:
        return None
    fastest = min(trial.p50_ms for trial in good)
    return min(
        (trial for trial in good if trial.p50_ms <= AS_FAST * fastest),
        key=lambda trial: (-trial.recall, trial.memory_bytes, trial.p50_ms),
    )
