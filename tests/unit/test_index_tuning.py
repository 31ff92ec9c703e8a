"""What tune-index makes of its trials."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from infra.errors import ConfigurationError
from infra.settings import CommonSettings
from infra.vector_store import MemoryVectorStore
from infra.vector_store.index import VectorIndex
from infra.vector_store.tuning import LEAST_ROWS, SCRATCH
from query_service.index_tuning.display import document, show, variables
from query_service.index_tuning.trials import (
    NEIGHBOURS,
    Sample,
    Trial,
    Tuning,
    builds,
    draw,
    exact,
    recall,
    recommend,
    searches,
)
from schemas.identity import ModelFingerprint, ObjectRef, content_hash_of
from schemas.vectors import VectorRow, collection_name

HNSW, IVF, FLAT = VectorIndex(search_effort=128), VectorIndex(kind="IVF_SQ8"), VectorIndex(kind="FLAT")


def trial(index: VectorIndex, found: float, p50_ms: float, memory_bytes: int = 1000) -> Trial:
    return Trial(index, found, p50_ms, 2 * p50_ms, memory_bytes, 1.0)


def vectors(rows: int, dimension: int = 8) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    made = np.random.default_rng(rows).standard_normal((rows, dimension)).astype(np.float32)
    unit: np.ndarray[tuple[int, int], np.dtype[np.float32]] = made / np.linalg.norm(made, axis=1, keepdims=True)
    return unit


def no_progress(description: str, total: int) -> Callable[[int], None]:
    return lambda steps: None


# -- the rule ----------------------------------------------------------------------------------------------------------
def test_the_fastest_that_finds_enough_is_recommended() -> None:
    slow, fast, blind = trial(HNSW, 0.999, 3.0), trial(HNSW, 0.99, 2.0), trial(IVF, 0.98, 1.0)
    assert recommend([slow, fast, blind], 0.99, whole=True) is fast
    assert recommend([slow, fast, blind], 0.98, whole=True) is blind
    assert recommend([slow, fast, blind], 0.9999, whole=True) is None
    assert recommend([], 0.5, whole=True) is None


def test_of_those_as_fast_the_one_that_finds_most_then_the_smallest() -> None:
    first, better, smaller = trial(HNSW, 0.99, 2.0), trial(HNSW, 1.0, 2.05), trial(IVF, 1.0, 2.06, memory_bytes=10)
    assert recommend([first, better, smaller], 0.99, whole=True) is smaller
    assert recommend([first, trial(HNSW, 1.0, 2.2)], 0.99, whole=True) is first


def test_exact_search_is_recommended_only_where_all_vectors_were_tried() -> None:
    exact_search, indexed = trial(FLAT, 1.0, 1.0), trial(HNSW, 0.995, 2.0)
    assert recommend([exact_search, indexed], 0.99, whole=True) is exact_search
    assert recommend([exact_search, indexed], 0.99, whole=False) is indexed
    assert recommend([exact_search], 0.99, whole=False) is None


# -- recall ------------------------------------------------------------------------------------------------------------
def test_exact_search_has_a_recall_of_one_and_a_row_found_twice_counts_once() -> None:
    sample = Sample("c", 210, vectors(200), vectors(210)[:10])
    nearest = exact(sample.stored, sample.queries)
    best = [np.argsort(-(sample.stored @ query))[:NEIGHBOURS].tolist() for query in sample.queries]
    assert recall(sample, nearest, best) == 1.0
    assert recall(sample, nearest, [rows[:1] * NEIGHBOURS for rows in best]) == pytest.approx(1 / NEIGHBOURS)
    assert recall(
        sample,
        nearest,
        [[*rows[:-1], int(np.argmin(sample.stored @ query))] for rows, query in zip(best, sample.queries, strict=True)],
    ) == (pytest.approx(0.9))
    assert recall(sample, nearest, [[] for _ in best]) == 0.0


def test_of_equal_vectors_any_is_right() -> None:
    """Copies of one picture have one vector: which of them an index returns is chance."""
    one = vectors(1)
    sample = Sample("c", 51, np.repeat(one, 50, axis=0), one)
    assert recall(sample, exact(sample.stored, one), [list(range(40, 50))]) == 1.0


# -- the sample --------------------------------------------------------------------------------------------------------
async def filled(rows: int) -> MemoryVectorStore:
    store = MemoryVectorStore()
    await store.create_collection("c", dimension=8)
    made = vectors(rows)
    for number in range(rows):
        ref = ObjectRef("b", f"{number}.jpg")
        row = VectorRow(ref.object_id, made[number], ref, content_hash_of(b"x"), 0, 1, 1, 1, "jpeg")
        await store.upsert("c", [row])
    return store


async def test_queries_are_not_among_what_they_search() -> None:
    sample = await draw(await filled(2600), "c", rows=2000, queries=50, progress=no_progress)
    assert (len(sample.stored), len(sample.queries), sample.rows, sample.whole) == (2000, 50, 2600, False)
    assert not {row.tobytes() for row in sample.stored} & {row.tobytes() for row in sample.queries}
    everything = await draw(await filled(1200), "c", rows=2000, queries=50, progress=no_progress)
    assert (len(everything.stored), everything.whole) == (1150, True)


async def test_too_few_vectors_are_refused_with_the_number_that_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=f"has 1050 vectors.*{LEAST_ROWS + 50} are needed"):
        await draw(await filled(1050), "c", rows=2000, queries=50, progress=no_progress)


# -- indexes and settings ----------------------------------------------------------------------------------------------
def test_no_search_looks_into_more_lists_than_there_are() -> None:
    for rows in (LEAST_ROWS, 20_000, 200_000):
        for built in builds(rows):
            found = list(searches(built))
            assert found and all(index.search_lists <= index.lists for index in found if index.kind.startswith("IVF"))
            assert {str(index.build_parameters) for index in found} == {str(built.build_parameters)}


@pytest.mark.parametrize("index", [HNSW, IVF, FLAT, VectorIndex(links=32, search_effort=256)])
def test_what_is_recommended_can_be_set(index: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(index).items():
        monkeypatch.setenv(name, value)
    asked = VectorIndex.from_settings(CommonSettings())
    assert asked.kind == index.kind and asked.build_parameters == index.build_parameters
    own = {"HNSW": ["ef"], "IVF_SQ8": ["nprobe"]}.get(index.kind, [])
    for name in own:
        assert asked.search_parameters(NEIGHBOURS)[name] == index.search_parameters(NEIGHBOURS)[name]


def test_a_compressed_index_is_smaller_and_links_cost_memory() -> None:
    sizes = [index.memory_bytes(100_000, 512) for index in (IVF, FLAT, VectorIndex(), VectorIndex(links=32))]
    assert sizes == sorted(set(sizes))
    assert FLAT.memory_bytes(100_000, 512) == 100_000 * 512 * 4


def test_a_scratch_collection_cannot_be_taken_for_one_of_the_product() -> None:
    assert SCRATCH not in collection_name(ModelFingerprint("c" * 64))


# -- what is shown -----------------------------------------------------------------------------------------------------
def test_the_table_names_the_recommendation_and_how_to_set_it() -> None:
    sample = Sample("images_1_v1", 5000, vectors(2000), vectors(20))
    best = trial(HNSW, 0.9951, 2.5, memory_bytes=3 * 2**20)
    tuning = Tuning(sample, 0.99, [trial(FLAT, 1.0, 1.5), best], best)
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show(tuning, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in shown.splitlines() if "recommended" in line)
    assert all(part in row for part in ("HNSW M=16 efConstruction=200", "ef=128", "0.9951", "2.50", "5.00", "3.0"))
    assert "IMAGE_SEARCH_MILVUS_SEARCH_EFFORT=128" in shown and "2,000 of 5,000 vectors" in shown
    assert "FLAT compares all vectors" in shown
    found = json.loads(json.dumps(document(tuning)))
    assert found["recommended"]["settings"] == variables(HNSW) and len(found["trials"]) == 2
    assert found["recommended"]["recall_at_10"] == 0.9951


def test_when_nothing_is_good_enough_the_table_says_what_to_change() -> None:
    tuning = Tuning(Sample("c", 2020, vectors(2000), vectors(20)), 0.99, [trial(HNSW, 0.5, 1.0)], None)
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show(tuning, console)
    assert "nothing reaches a recall of 0.99: give a lower --recall" in console.file.getvalue()  # type: ignore[attr-defined]
    assert document(tuning)["recommended"] is None
