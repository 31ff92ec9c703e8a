"""Recall, mAP, µAP and bands: by hand, by properties, and against a plain reading of their formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from processors.embedding.embedder import Vectors
from processors.training.edits import Edit
from processors.training.evaluate import worst_misses
from processors.training.extraction import Sample
from processors.training.labelled import LabelledPicture
from processors.training.measures import band, measure, measure_kind
from processors.training.ranking import NOBODY, GroundTruth, Ranking, rank_all


def numbers(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def by_scores(scores: list[list[float]], query_groups: list[int], reference_groups: list[int]) -> Ranking:
    """Queries and references whose products are exactly these scores (of 100)."""
    wanted = np.array(scores, dtype=np.float32) / np.float32(100)
    count = len(query_groups)
    truth = GroundTruth(numbers(*query_groups), numbers(*reference_groups), np.full(count, NOBODY, dtype=np.int64))
    return rank_all(wanted, np.eye(wanted.shape[1], dtype=np.float32), truth)


# Two queries against four references. First: right 90, 40; wrong 60, 10. Second: right 70; wrong 80, 50, 20.
HAND = by_scores([[90, 60, 40, 10], [80, 70, 50, 20]], [1, 2], [1, 2, 1, NOBODY])


def test_by_hand() -> None:
    measures = measure(HAND, recall_at=(1, 2))
    assert (measures.queries, measures.queries_without_right) == (2, 0)
    assert HAND.queries.rank.tolist() == [1, 2]
    assert measures.recall_at == {1: 0.5, 2: 1.0}
    # First query: right ones at places 1 and 3: (1/1 + 2/3) / 2. Second: at place 2: 1/2.
    assert measures.mean_average_precision == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    # All eight pairs: 90 right, 80, 70 right, 60, 50, 40 right, 20, 10.
    assert measures.micro_average_precision == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
    assert HAND.pairs.scores.tolist() == pytest.approx([90, 70, 40])
    assert HAND.pairs.right_at_least.tolist() == [1, 2, 3] and HAND.pairs.wrong_at_least.tolist() == [0, 1, 3]


def test_bands_by_hand() -> None:
    def found(precision: float) -> tuple[float, float, float] | None:
        of = band(HAND.pairs, precision)
        return (round(of.score, 3), round(of.precision, 3), round(of.recall, 3)) if of else None

    assert found(0.9) == (90.0, 1.0, 0.333)
    assert found(0.6) == (70.0, 0.667, 0.667)
    assert found(0.5) == (40.0, 0.5, 1.0)
    wrong_first = by_scores([[90, 80]], [1], [NOBODY, 1])
    assert band(wrong_first.pairs, 0.9) is None and measure(wrong_first).likely is None


def test_the_lowest_score_counts_even_if_precision_fell_below_in_between() -> None:
    # Right 99; wrong 98; then eighteen right ones: 19 of 20 in the end.
    scores = [99.0, 98.0, *(float(score) for score in range(90, 72, -1))]
    ranking = by_scores([scores], [1], [1, 2, *([1] * 18)])
    found = band(ranking.pairs, 0.9)
    assert found is not None and found.score == pytest.approx(73) and found.recall == 1.0


def test_best_right_and_best_wrong_by_hand() -> None:
    results = HAND.queries
    assert results.best_right.tolist() == [0, 1] and results.best_wrong.tolist() == [1, 0]
    assert results.best_right_score.tolist() == pytest.approx([90, 70])
    assert results.best_wrong_score.tolist() == pytest.approx([60, 80])
    assert HAND.right_histogram.sum() == 3 and HAND.wrong_histogram.sum() == 5
    assert HAND.right_histogram[140] == 1, "40 lies in the bin from 40 to 41"


def test_ties_go_against_us() -> None:
    tied = by_scores([[50, 50, 50]], [1], [1, 2, 3])
    assert tied.queries.rank.tolist() == [3]
    assert measure(tied).micro_average_precision == pytest.approx(1 / 3)


def test_a_query_does_not_find_itself() -> None:
    vectors = np.eye(3, dtype=np.float32)
    truth = GroundTruth(numbers(1, 1, NOBODY), numbers(1, 1, NOBODY), numbers(0, 1, 2))
    ranking = rank_all(vectors, vectors, truth)
    assert len(ranking.pairs.scores) == 2 and ranking.right_histogram.sum() == 2
    assert ranking.wrong_histogram.sum() == 4, "6 pairs without the three of itself"
    assert ranking.queries.rank.tolist() == [2, 2, 0]


def test_queries_without_a_right_reference_only_count_as_chances_to_be_wrong() -> None:
    alone = by_scores([[90, 10]], [1], [1, 2])
    beside = by_scores([[90, 10], [95, 20]], [1, NOBODY], [1, 2])
    assert measure(alone).micro_average_precision == 1.0
    measures = measure(beside)
    assert measures.recall_at[1] == 1.0 and measures.mean_average_precision == 1.0
    assert measures.micro_average_precision == 0.5
    assert (measures.queries, measures.queries_without_right) == (1, 1)


def test_nothing_right_is_an_error_and_nothing_of_a_kind_is_none() -> None:
    ranking = by_scores([[90, 10]], [NOBODY], [1, 2])
    with pytest.raises(ValueError, match="no right reference"):
        measure(ranking)
    assert math.isnan(ranking.pairs.average_precision())
    assert measure_kind(ranking.queries, np.array([True]), None) is None


def test_measures_of_a_kind() -> None:
    likely = band(HAND.pairs, 0.6)
    first = measure_kind(HAND.queries, np.array([True, False]), likely)
    second = measure_kind(HAND.queries, np.array([False, True]), band(HAND.pairs, 0.9))
    assert first is not None and (first.queries, first.recall_at_1, first.likely) == (1, 1.0, 1.0)
    assert second is not None and (second.queries, second.recall_at_1, second.likely) == (1, 0.0, 0.0)


def test_worst_misses_come_in_the_order_of_how_wrong_they_are() -> None:
    ranking = by_scores([[90, 60, 0], [80, 70, 0], [80, 10, 0]], [1, 2, 2], [1, 2, 3])
    queries = [Sample(LabelledPicture(Path(f"q{number}"), None), (Edit.CROP,)) for number in range(3)]
    references = [Sample(LabelledPicture(Path(f"r{number}"), None)) for number in range(3)]
    misses = worst_misses(ranking.queries, queries, references)
    assert [(miss.query, miss.wrong, miss.right, miss.rank) for miss in misses] == [
        ("q2", "r0", "r1", 2),
        ("q1", "r0", "r1", 2),
    ]
    assert misses[0].edit is Edit.CROP and misses[0].wrong_score == pytest.approx(80)


@dataclass(frozen=True)
class Case:
    queries: Vectors
    references: Vectors
    truth: GroundTruth


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small whole numbers: their products are exact, and ties are common."""
    dimension = draw(st.integers(1, 3))
    row = st.lists(st.integers(-2, 2), min_size=dimension, max_size=dimension)
    references = draw(st.lists(row, min_size=1, max_size=12))
    groups = st.sampled_from([NOBODY, 0, 1, 2])
    reference_groups = draw(st.lists(groups, min_size=len(references), max_size=len(references)))
    if draw(st.booleans()):
        queries, query_groups, own = references, reference_groups, list(range(len(references)))
    else:
        queries = draw(st.lists(row, min_size=1, max_size=8))
        query_groups = draw(st.lists(groups, min_size=len(queries), max_size=len(queries)))
        own = [NOBODY] * len(queries)
    # Halves of halves: the scores stay exact, and within the histograms.
    scale = np.float32(1 / 4)
    return Case(
        np.array(queries, dtype=np.float32) * scale,
        np.array(references, dtype=np.float32) * scale,
        GroundTruth(numbers(*query_groups), numbers(*reference_groups), numbers(*own)),
    )


def plain_average_precision(pairs: list[tuple[float, bool]]) -> float:
    """Σ over thresholds of (recall − recall before) × precision, as scikit-learn documents average_precision_score."""
    total = sum(right for _, right in pairs)
    area = before = 0.0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        taken = [right for score, right in pairs if score >= threshold]
        recall = sum(taken) / total
        area += (recall - before) * sum(taken) / len(taken)
        before = recall
    return area


def plain_pairs(case: Case, query: int) -> list[tuple[float, bool]]:
    truth = case.truth
    group = truth.query_groups[query]
    return [
        (100 * float(case.queries[query] @ case.references[place]), bool(group != NOBODY and other == group))
        for place, other in enumerate(truth.reference_groups)
        if place != truth.own[query]
    ]


@given(cases(), st.integers(1, 400))
@settings(max_examples=120, deadline=None)
def test_as_a_plain_reading_of_the_formulas_says(case: Case, block_bytes: int) -> None:
    by_query = [plain_pairs(case, query) for query in range(len(case.queries))]
    answerable = [pairs for pairs in by_query if any(right for _, right in pairs)]
    assume(answerable)
    ranking = rank_all(case.queries, case.references, case.truth, block_bytes=block_bytes)
    measures = measure(ranking, recall_at=(1, 2, 5))
    everything = [pair for pairs in by_query for pair in pairs]
    assert measures.micro_average_precision == pytest.approx(plain_average_precision(everything))
    assert measures.mean_average_precision == pytest.approx(np.mean([plain_average_precision(pairs) for pairs in answerable]))
    for k, recall in measures.recall_at.items():
        found = []
        for pairs in answerable:
            best = max(score for score, right in pairs if right)
            found.append(sum(not right and score >= best for score, right in pairs) < k)
        assert recall == pytest.approx(np.mean(found))
    assert ranking.right_histogram.sum() == sum(right for _, right in everything)
    assert ranking.wrong_histogram.sum() == sum(not right for _, right in everything)
    thresholds = []
    for threshold in {score for score, right in everything if right}:
        taken = [right for score, right in everything if score >= threshold]
        if sum(taken) / len(taken) >= 0.9:
            thresholds.append(threshold)
    assert (measures.likely and measures.likely.score) == (pytest.approx(min(thresholds)) if thresholds else None)


@given(cases(), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_the_order_of_queries_and_references_changes_nothing(case: Case, seed: int) -> None:
    assume((case.truth.own == NOBODY).all())
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(case.queries)), rng.permutation(len(case.references))
    truth = case.truth
    moved = GroundTruth(truth.query_groups[rows], truth.reference_groups[columns], truth.own[rows])
    before = rank_all(case.queries, case.references, truth)
    assume((before.queries.rank > 0).any())
    after = rank_all(case.queries[rows], case.references[columns], moved)
    one, other = measure(before), measure(after)
    assert one.model_dump(exclude={"mean_average_precision"}) == other.model_dump(exclude={"mean_average_precision"})
    assert one.mean_average_precision == pytest.approx(other.mean_average_precision)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_a_perfect_ranking_is_one_in_every_measure(groups: int, members: int, block_bytes: int) -> None:
    """Vectors of one group are the same, those of two groups are orthogonal."""
    labels = np.repeat(np.arange(groups), members)
    references = np.eye(groups + 1, dtype=np.float32)[labels]
    queries = np.eye(groups + 1, dtype=np.float32)[:groups]
    truth = GroundTruth(np.arange(groups), labels, np.full(groups, NOBODY, dtype=np.int64))
    told: list[int] = []
    measures = measure(rank_all(queries, references, truth, block_bytes=block_bytes, advance=told.append))
    assert sum(told) == 2 * groups
    assert set(measures.recall_at.values()) == {1.0}
    assert measures.mean_average_precision == measures.micro_average_precision == 1.0
    for found in (measures.surely, measures.likely):
        assert found is not None and (found.score, found.precision, found.recall) == (100.0, 1.0, 1.0)
