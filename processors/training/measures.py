"""The figures of an evaluation. docs/evaluation.md has the formulas and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from processors.training.ranking import PairRanking, QueryResults, Ranking

RECALL_AT: Final = (1, 5, 10)

SURELY_PRECISION: Final = 0.99
LIKELY_PRECISION: Final = 0.9
"""P90: what the literature of copy detection sets its threshold by."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True)


class Band(_Figures):
    """Pairs that score at least `score`: the share of them that is right, and the share of all right pairs that they are."""

    score: float
    precision: float
    recall: float


class Measures(_Figures):
    """`recall_at`: k to the share of queries with a right picture among the first k. None: there is no such score.

    Queries for which nothing is right count only as chances to be wrong: in `micro_average_precision` and in the bands.
    """

    queries: int
    queries_without_right: int
    recall_at: dict[int, float]
    mean_average_precision: float
    micro_average_precision: float
    surely: Band | None
    likely: Band | None


class KindMeasures(_Figures):
    """Of the queries of one kind, for example one edit. `likely`: the share whose best right picture is in that band."""

    queries: int
    recall_at_1: float
    mean_average_precision: float
    likely: float | None


def measure(ranking: Ranking, recall_at: Sequence[int] = RECALL_AT) -> Measures:
    """Raises ValueError when nothing is right for any query."""
    ranks = ranking.queries.rank
    answerable = ranks > 0
    if not answerable.any():
        raise ValueError("there is no right reference for any query")
    return Measures(
        queries=int(answerable.sum()),
        queries_without_right=int((~answerable).sum()),
        recall_at={k: float((ranks[answerable] <= k).mean()) for k in recall_at},
        mean_average_precision=float(ranking.queries.average_precision[answerable].mean()),
        micro_average_precision=ranking.pairs.average_precision(),
        surely=band(ranking.pairs, SURELY_PRECISION),
        likely=band(ranking.pairs, LIKELY_PRECISION),
    )


def measure_kind(results: QueryResults, of_kind: npt.NDArray[np.bool_], likely: Band | None) -> KindMeasures | None:
    """None when there is nothing to measure."""
    chosen = of_kind & (results.rank > 0)
    if not chosen.any():
        return None
    return KindMeasures(
        queries=int(chosen.sum()),
        recall_at_1=float((results.rank[chosen] == 1).mean()),
        mean_average_precision=float(results.average_precision[chosen].mean()),
        likely=float((results.best_right_score[chosen] >= likely.score).mean()) if likely else None,
    )


def band(pairs: PairRanking, precision: float) -> Band | None:
    """From the lowest score of a right pair at which precision is still at least that."""
    good = np.flatnonzero(pairs.precision >= precision)
    if not len(good):
        return None
    last = int(good[-1])
    return Band(score=float(pairs.scores[last]), precision=float(pairs.precision[last]), recall=float(pairs.recall[last]))
