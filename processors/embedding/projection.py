"""A fixed orthonormal map to fewer dimensions, the same on every machine and with every library version.

It is a subsampled, randomised Hadamard transform: signs and rows are drawn from SHA-256 of a seed, so neither a random
generator nor a matrix factorisation, whose results may change with their library, stands between a row and its vectors.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def orthonormal_projection(seed: str, rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Shape (rows, columns), orthonormal rows, every entry ±1/√columns. `columns` is a power of two, not below `rows`."""
    if columns < rows or columns.bit_count() != 1:
        raise ValueError("columns must be a power of two and not below rows")
    chosen = sorted(range(columns), key=lambda row: _draw(seed, "row", row))[:rows]
    signs = np.array([1 if _draw(seed, "sign", column)[0] & 1 else -1 for column in range(columns)], dtype=np.float32)
    return _hadamard(columns)[chosen] * signs / np.float32(columns**0.5)


def _draw(seed: str, purpose: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{number}".encode()).digest()


def _hadamard(size: int) -> npt.NDArray[np.float32]:
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
