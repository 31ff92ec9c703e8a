"""Exact search of all references for all queries, in bounded memory, and what the measures need of it.

Nothing is approximated and nothing cut off: each query is compared with each reference, block by block, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from processors.embedding.embedder import Vectors
from schemas.vectors import score_of

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NOBODY: Final = -1
"""Place of a reference that there is none of; group of a picture that belongs to no other."""

BLOCK_BYTES: Final = 64 * 1024 * 1024
"""Scores held at once; a few arrays of that size live beside them. One query with all references is the least."""

SCORE_BIN_EDGES: Final = np.linspace(-100.0, 100.0, 201)
"""Of the histograms."""


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """Which references are right for a query: those of its group, but for itself. All others are wrong.

    `own`: the query's own place among the references, or NOBODY. A group of NOBODY is right for nobody.
    """

    query_groups: Counts
    reference_groups: Counts
    own: Counts

    def masks(self, queries: slice) -> tuple[Mask, Mask]:
        """Right and wrong pairs, each of shape (queries, references). A query and itself are neither."""
        groups = self.query_groups[queries, None]
        others = np.arange(len(self.reference_groups)) != self.own[queries, None]
        right = (groups == self.reference_groups) & (groups != NOBODY) & others
        return right, others & ~right


@dataclass(frozen=True, slots=True, eq=False)
class PairRanking:
    """All right pairs by falling score, and how many pairs, right and wrong, score at least that. Ties go against us."""

    scores: Scores
    right_at_least: Counts
    wrong_at_least: Counts

    @property
    def precision(self) -> Floats:
        """Of all pairs that score at least that, the share that is right."""
        precision: Floats = self.right_at_least / (self.right_at_least + self.wrong_at_least)
        return precision

    @property
    def recall(self) -> Floats:
        recall: Floats = self.right_at_least / max(1, len(self.scores))
        return recall

    def average_precision(self) -> float:
        """Precision at each right pair, averaged: Σ (recall step × precision). NaN where nothing is right."""
        return float(self.precision.mean()) if len(self.scores) else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class QueryResults:
    """For each query its best right and its best wrong reference (or NOBODY) and their scores (or −inf).

    `rank` of the best right one: 1 + the number of wrong ones that score at least as much; 0 where nothing is right.
    `average_precision` of the query's own ranking: NaN where nothing is right.
    """

    best_right: Counts
    best_right_score: Scores
    best_wrong: Counts
    best_wrong_score: Scores
    rank: Counts
    average_precision: Floats

    @classmethod
    def empty(cls, queries: int) -> QueryResults:
        return cls(
            best_right=np.full(queries, NOBODY, dtype=np.int64),
            best_right_score=np.full(queries, -np.inf, dtype=np.float32),
            best_wrong=np.full(queries, NOBODY, dtype=np.int64),
            best_wrong_score=np.full(queries, -np.inf, dtype=np.float32),
            rank=np.zeros(queries, dtype=np.int64),
            average_precision=np.full(queries, np.nan),
        )

    def fill(self, query: int, scores: Scores, right: Mask, wrong: Mask) -> None:
        wrong_scores = scores[wrong]
        if len(wrong_scores):
            self.best_wrong[query] = np.flatnonzero(wrong)[wrong_scores.argmax()]
            self.best_wrong_score[query] = wrong_scores.max()
        right_scores = scores[right]
        if len(right_scores):
            self.best_right[query] = np.flatnonzero(right)[right_scores.argmax()]
            self.best_right_score[query] = right_scores.max()
            rising = np.sort(right_scores)
            pairs = _pair_ranking(rising, _at_least(rising, wrong_scores))
            self.rank[query] = 1 + pairs.wrong_at_least[0]
            self.average_precision[query] = pairs.average_precision()


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Scores are on the scale that people see: 100 × cosine. The histograms count pairs by SCORE_BIN_EDGES."""

    pairs: PairRanking
    queries: QueryResults
    right_histogram: Counts
    wrong_histogram: Counts


def rank_all(
    queries: Vectors,
    references: Vectors,
    truth: GroundTruth,
    *,
    block_bytes: int = BLOCK_BYTES,
    advance: Callable[[int], None] = lambda _: None,
) -> Ranking:
    """`advance` is told how many queries were compared since the last time: in all twice as many as there are."""
    rows = max(1, block_bytes // (4 * max(1, len(references))))
    blocks = [slice(start, min(start + rows, len(queries))) for start in range(0, len(queries), rows)]
    # First the right pairs alone: how many wrong ones lie above each can be counted once all of them are known.
    found = [np.empty(0, dtype=np.float32)]
    for block, scores in _scores(queries, references, blocks):
        found.append(scores[truth.masks(block)[0]])
        advance(len(scores))
    rising = np.sort(np.concatenate(found))
    wrong_at_least = np.zeros(len(rising), dtype=np.int64)
    wrong_histogram = np.zeros(len(SCORE_BIN_EDGES) - 1, dtype=np.int64)
    results = QueryResults.empty(len(queries))
    for block, scores in _scores(queries, references, blocks):
        right, wrong = truth.masks(block)
        wrong_scores = scores[wrong]
        wrong_at_least += _at_least(rising, wrong_scores)
        wrong_histogram += _histogram(wrong_scores)
        for row in range(len(scores)):
            results.fill(block.start + row, scores[row], right[row], wrong[row])
        advance(len(scores))
    return Ranking(_pair_ranking(rising, wrong_at_least), results, _histogram(rising), wrong_histogram)


def _scores(queries: Vectors, references: Vectors, blocks: list[slice]) -> Iterator[tuple[slice, Scores]]:
    for block in blocks:
        # The same blocks in both rounds, so that a pair has the same score to the last bit.
        similarity = queries[block] @ references.T
        yield block, (similarity * np.float32(score_of(1.0))).astype(np.float32, copy=False)


def _pair_ranking(rising: Scores, wrong_at_least: Counts) -> PairRanking:
    right_at_least = len(rising) - np.searchsorted(rising, rising, side="left")
    return PairRanking(rising[::-1], right_at_least[::-1], wrong_at_least[::-1])


def _at_least(rising: Scores, scores: Scores) -> Counts:
    """For each of `rising` the number of `scores` that are not below it."""
    # Most wrong pairs lie below every right one, and looking a place up costs more than a comparison.
    high = scores[scores >= rising[0]] if len(rising) else scores[:0]
    places = np.searchsorted(rising, high, side="right")
    counts: Counts = np.bincount(places, minlength=len(rising) + 1).astype(np.int64)
    # A score at place p is not below the first p: summed from the highest down.
    return counts[:0:-1].cumsum()[::-1]


def _histogram(scores: Scores) -> Counts:
    least, most = SCORE_BIN_EDGES[0], SCORE_BIN_EDGES[-1]
    # Rounding may put a cosine beyond 1. A number of bins in place of the edges: they are even, which is counted faster.
    counts: Counts = np.histogram(np.clip(scores, least, most), len(SCORE_BIN_EDGES) - 1, (least, most))[0]
    return counts.astype(np.int64)
