"""The vector collection: one for each model fingerprint and schema version, one row an object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef

COLLECTION_SCHEMA_VERSION = 1

Vector = npt.NDArray[np.float32]
"""One unit vector, shape (dimension,), float32."""


def collection_name(fingerprint: ModelFingerprint, prefix: str = "") -> str:
    return f"{prefix}images_{fingerprint[:16]}_v{COLLECTION_SCHEMA_VERSION}"


@dataclass(frozen=True, slots=True)
class VectorRow:
    """What is written for an object. `vector` is a unit vector of float32."""

    object_id: ObjectId
    vector: Vector
    ref: ObjectRef
    content_hash: ContentHash
    put_time_us: int
    size: int
    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class StoredVector:
    """A vector as it lies there, with what its picture was: enough to write a row anew without decoding it again."""

    object_id: ObjectId
    content_hash: ContentHash
    vector: Vector
    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class VectorHit:
    """`similarity` is the cosine, in [-1, 1]."""

    object_id: ObjectId
    content_hash: ContentHash
    similarity: float


def score_of(similarity: float) -> float:
    """100 × cosine: what people see. Can be below 0."""
    return 100.0 * similarity


def distance_of(similarity: float) -> float:
    """Squared L2 distance of unit vectors: |a − b|² = 2 − 2·cos. 0 = the same, as the older project showed it."""
    return max(0.0, 2.0 - 2.0 * similarity)
