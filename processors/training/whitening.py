"""PCA-whitening: mean and covariance of vectors that come in parts, and the map to fewer dimensions made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigurationError
from processors.embedding.embedder import Vectors

Numbers = npt.NDArray[np.float64]

_FLAT: Final = 1e-7
"""A direction whose variance is below this share of the strongest is rounding, not what pictures differ in."""


class RunningMoments:
    """Count, mean and scatter of all vectors so far; memory: one matrix, however many there are.

    Parts are joined as by T. Chan, G. Golub and R. LeVeque (1979), in float64: sums of squares would cancel.
    """

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean: Numbers = np.zeros(columns)
        self._scatter: Numbers = np.zeros((columns, columns))

    def add(self, vectors: Vectors | Numbers) -> None:
        part = np.asarray(vectors, dtype=np.float64)
        if not len(part):
            return
        mean = part.mean(axis=0)
        part = part - mean
        apart = mean - self.mean
        total = self.count + len(part)
        self._scatter += part.T @ part
        self._scatter += np.outer(apart, apart * (self.count * len(part) / total))
        self.mean = self.mean + apart * (len(part) / total)
        self.count = total

    def covariance(self) -> Numbers:
        return self._scatter / self.count


def oracle_shrinkage(moments: RunningMoments) -> float:
    """How far the covariance of few vectors should be drawn to a multiple of the identity, 0 to 1.

    Oracle approximating shrinkage, Y. Chen et al., *Shrinkage algorithms for MMSE covariance estimation*, 2010, eq. 23.
    """
    covariance, columns, count = moments.covariance(), len(moments.mean), moments.count
    squares, square = float(np.sum(covariance**2)), float(np.trace(covariance)) ** 2
    apart = (count + 1 - 2 / columns) * (squares - square / columns)
    return 1.0 if apart <= 0 else min(1.0, ((1 - 2 / columns) * squares + square) / apart)


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """`matrix`: shape (dimension, columns). `kept`: share of the variance that lies in these directions."""

    matrix: Numbers
    kept: float


def whitening_matrix(moments: RunningMoments, dimension: int, *, whitening: float, shrinkage: float) -> Solved:
    """The strongest directions, each divided by its deviation to the power of `whitening`.

    Raises ConfigurationError when the vectors do not differ in so many directions.
    """
    columns = len(moments.mean)
    if not 0 < dimension <= columns:
        raise ConfigurationError(f"the vectors have {columns} floats: a projection makes 1 to {columns} of them")
    if moments.count <= dimension:
        raise ConfigurationError(
            f"a projection to {dimension} floats needs more than {dimension} pictures, better {4 * columns} and more; here are "
            f"{moments.count}. Give more pictures or a smaller --dimension"
        )
    variances, directions = _directions(moments.covariance())
    if variances[dimension - 1] <= _FLAT * variances[0]:
        raise ConfigurationError(
            f"these {moments.count} pictures do not differ in {dimension} directions; are many of them the same? Give other "
            "pictures or a smaller --dimension"
        )
    drawn = (1 - shrinkage) * variances + shrinkage * variances.mean()
    scale = drawn[:dimension] ** (-whitening / 2)
    # Only angles count, so the size may be what reads well: the strongest direction keeps its length.
    matrix = directions[:dimension] * (scale / scale[0])[:, None]
    return Solved(matrix, float(variances[:dimension].sum() / variances.sum()))


def _directions(covariance: Numbers) -> tuple[Numbers, Numbers]:
    """Variances, the largest first, and a row for each; the sign of each such that its largest entry is positive."""
    values, vectors = np.linalg.eigh(covariance)
    rows: npt.NDArray[Any] = vectors.T[::-1]
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    return np.maximum(values[::-1], 0.0), rows * np.where(largest < 0, -1.0, 1.0)[:, None]
