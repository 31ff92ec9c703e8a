"""Mean and covariance in parts, and what is made of them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from infra.errors import ConfigurationError
from processors.training.whitening import RunningMoments, oracle_shrinkage, whitening_matrix

Numbers = npt.NDArray[np.float64]


def uneven(count: int, columns: int, seed: int = 3) -> Numbers:
    """Far from 0, and in each direction of another strength."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((columns, columns)) * np.geomspace(3, 0.02, columns)
    rows: Numbers = generator.standard_normal((count, columns)) @ mixed.T + 50.0
    return rows


def moments_of(rows: Numbers, *parts: int) -> RunningMoments:
    moments = RunningMoments(rows.shape[1])
    for part in np.split(rows, parts):
        moments.add(part)
    return moments


@pytest.mark.parametrize("parts", [(), (1,), (1, 2, 3), (100, 100, 250), tuple(range(1, 400)), (0, 400)])
def test_parts_of_any_size_give_what_numpy_makes_of_the_whole(parts: tuple[int, ...]) -> None:
    rows = uneven(400, 16)
    moments = moments_of(rows, *parts)
    assert moments.count == 400
    assert np.allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    assert np.allclose(moments.covariance(), np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-12)


def test_a_mean_far_away_does_not_eat_the_deviations() -> None:
    """Sums of squares would: 1e8² leaves nothing of 1e-2 in 53 bits."""
    rows = np.random.default_rng(1).standard_normal((300, 4)) * 1e-2 + 1e6
    assert np.allclose(moments_of(rows, 77, 191).covariance(), np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-9)


def test_what_was_added_is_not_kept() -> None:
    part, moments = uneven(500, 32), RunningMoments(32)
    moments.add(part)
    tracemalloc.start()
    try:
        for _ in range(40):
            moments.add(part.copy())
        assert tracemalloc.get_traced_memory()[0] < 2 * part.nbytes
    finally:
        tracemalloc.stop()
    assert moments.count == 41 * 500


def test_whitened_vectors_are_equally_strong_and_have_nothing_to_do_with_each_other() -> None:
    rows = uneven(3000, 12)
    moments = moments_of(rows)
    matrix = whitening_matrix(moments, 12, whitening=1.0, shrinkage=0.0).matrix
    white = np.cov(((rows - moments.mean) @ matrix.T).T, bias=True)
    assert np.allclose(white / white[0, 0], np.eye(12), atol=1e-6)


def test_without_whitening_the_strongest_directions_stay_as_they_are() -> None:
    rows = uneven(500, 12)
    solved = whitening_matrix(moments_of(rows), 5, whitening=0.0, shrinkage=0.3)
    assert np.allclose(solved.matrix @ solved.matrix.T, np.eye(5), atol=1e-12)
    strengths = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    assert solved.kept == pytest.approx(strengths[:5].sum() / strengths.sum())


def test_shrinkage_holds_back_the_weak_directions() -> None:
    moments = moments_of(uneven(500, 12))
    weak = [
        np.linalg.norm(whitening_matrix(moments, 12, whitening=1.0, shrinkage=shrinkage).matrix[-1])
        for shrinkage in (0.0, 0.1, 0.5, 1.0)
    ]
    assert weak[0] > weak[1] > weak[2] > weak[3] == pytest.approx(1.0)


def test_the_same_vectors_give_the_same_matrix() -> None:
    rows = uneven(500, 12)
    one, other = (whitening_matrix(moments_of(rows, *parts), 6, whitening=1.0, shrinkage=0.1).matrix for parts in ((), (90,)))
    assert np.allclose(one, other, atol=1e-6)


def test_few_vectors_call_for_more_shrinkage_than_many() -> None:
    few, some, many = (oracle_shrinkage(moments_of(uneven(count, 40))) for count in (30, 100, 20_000))
    assert 1 >= few > some > many > 0
    assert many < 0.001


def test_the_shrinkage_is_near_the_one_that_comes_nearest_to_the_truth() -> None:
    true = np.diag(np.geomspace(4, 0.25, 30))
    rows = np.random.default_rng(8).standard_normal((25, 30)) @ np.sqrt(true)
    moments = moments_of(rows)
    sample = moments.covariance()
    target = np.eye(30) * np.trace(sample) / 30

    def apart(shrinkage: float) -> float:
        return float(np.linalg.norm((1 - shrinkage) * sample + shrinkage * target - true))

    best = min(apart(shrinkage) for shrinkage in np.linspace(0, 1, 101))
    assert apart(oracle_shrinkage(moments)) < 1.1 * best < 0.8 * apart(0.0)


def test_vectors_that_are_all_the_same_are_drawn_all_the_way() -> None:
    assert oracle_shrinkage(moments_of(np.ones((50, 4)))) == 1.0


@pytest.mark.parametrize("count", [1, 8])
def test_too_few_pictures_for_so_many_floats(count: int) -> None:
    with pytest.raises(ConfigurationError, match=r"to 8 floats needs more than 8 pictures, better 64 and more; here are \d"):
        whitening_matrix(moments_of(uneven(count, 16)), 8, whitening=1.0, shrinkage=0.5)


def test_fewer_pictures_than_floats_of_the_model_are_enough_for_a_smaller_dimension() -> None:
    matrix = whitening_matrix(moments_of(uneven(9, 16)), 8, whitening=1.0, shrinkage=0.2).matrix
    assert matrix.shape == (8, 16) and np.isfinite(matrix).all()


def test_copies_do_not_count_as_pictures() -> None:
    with pytest.raises(ConfigurationError, match="do not differ in 8 directions"):
        whitening_matrix(moments_of(np.tile(uneven(5, 16), (10, 1))), 8, whitening=1.0, shrinkage=0.5)


@pytest.mark.parametrize("dimension", [0, 17])
def test_a_projection_makes_vectors_shorter(dimension: int) -> None:
    with pytest.raises(ConfigurationError, match="1 to 16"):
        whitening_matrix(moments_of(uneven(50, 16)), dimension, whitening=1.0, shrinkage=0.0)
