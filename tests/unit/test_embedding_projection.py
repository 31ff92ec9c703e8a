"""The map to fewer dimensions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from processors.embedding.projection import orthonormal_projection


def test_rows_are_orthonormal() -> None:
    matrix = orthonormal_projection("seed", 100, 256)
    assert matrix.shape == (100, 256) and matrix.dtype == np.float32
    assert np.allclose(matrix @ matrix.T, np.eye(100), atol=1e-6)


def test_it_is_made_from_the_seed_alone() -> None:
    assert np.array_equal(orthonormal_projection("a", 8, 64), orthonormal_projection("a", 8, 64))
    assert not np.array_equal(orthonormal_projection("a", 8, 64), orthonormal_projection("b", 8, 64))


def test_the_projection_of_resnet50_stays_what_it_is() -> None:
    signs = orthonormal_projection("resnet50/1", 512, 2048) > 0
    assert hashlib.sha256(np.packbits(signs).tobytes()).hexdigest()[:16] == "4339bbeb96c7913d"


def test_it_keeps_cosines_about_as_they_are() -> None:
    vectors = np.abs(np.random.default_rng(5).standard_normal((60, 2048))).astype(np.float32)
    vectors[1] = vectors[0] + 0.3 * vectors[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    small = vectors @ orthonormal_projection("resnet50/1", 512, 2048).T
    small /= np.linalg.norm(small, axis=1, keepdims=True)
    assert np.abs(small @ small.T - vectors @ vectors.T).max() < 0.1


@pytest.mark.parametrize(("rows", "columns"), [(4, 100), (65, 64), (1, 0)])
def test_sizes_that_it_cannot_have(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        orthonormal_projection("seed", rows, columns)
