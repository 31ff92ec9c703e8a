"""From bytes to vectors of one model. Equal content is embedded once, in a batch and across all that is indexed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from infra.errors import ImageRejected, TransientError
from infra.metadata_store.interface import ModelRow
from infra.metrics import VECTORS
from infra.retry import until_done
from infra.vector_store.interface import VectorStore
from processors.decode import Decoded
from processors.embedding.embedder import Embedder
from processors.steps import timed
from processors.work import Facts
from schemas.identity import ContentHash, ObjectId, content_hash_of
from schemas.vectors import Vector


class Decoder(Protocol):
    """What decode_pool.DecodePool offers: each picture by itself becomes pixels or is rejected."""

    async def decode(self, items: Sequence[bytes]) -> list[Decoded | ImageRejected]: ...


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes by what they are, whoever holds them. `fresh`: compute the vector anew, trust none that is stored."""

    content_hash: ContentHash
    md5: bytes
    data: bytes
    fresh: bool = False


Holders = Mapping[ContentHash, Sequence[ObjectId]]
"""Indexed objects that have a content already, oldest first."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A vector and the facts of the picture it was made of; timings in milliseconds a picture."""

    facts: Facts
    vector: Vector
    timings_ms: Mapping[str, float] = field(default_factory=dict)


def hash_contents(items: Sequence[tuple[bytes, bool]]) -> list[Content]:
    """Hashes of many objects in one go. Call it on a thread: for large objects it takes tens of milliseconds."""
    return [
        Content(content_hash_of(data), hashlib.md5(data, usedforsecurity=False).digest(), data, fresh) for data, fresh in items
    ]


class Vectorizer:
    """Bytes to vectors of one model, reusing what the model's collection already holds."""

    def __init__(
        self,
        model: ModelRow,
        *,
        vectors: VectorStore,
        decoder: Decoder,
        embedder: Embedder,
        on_wait: Callable[[TransientError, int], None],
    ) -> None:
        self.model = model
        self._vectors, self._decoder, self._embedder, self._on_wait = vectors, decoder, embedder, on_wait

    async def reuse(self, candidates: Holders) -> dict[ContentHash, Embedded]:
        """Vectors that the collection holds of these contents, among these objects.

        That an object may have one is a guess: the vector counts when the content hash beside it, read in the same query,
        is ours. Another writer may have replaced it a moment ago.
        """
        if not candidates:
            return {}
        ids = {object_id for of_content in candidates.values() for object_id in of_content}
        stored = await until_done(lambda: self._vectors.fetch(self.model.collection, ids), on_wait=self._on_wait)
        found: dict[ContentHash, Embedded] = {}
        for content_hash, of_content in candidates.items():
            same = (one for object_id in of_content if (one := stored.get(object_id)) and one.content_hash == content_hash)
            if (vector := next(same, None)) is not None:
                found[content_hash] = Embedded(Facts(vector.width, vector.height, vector.format), vector.vector)
        return found

    async def embed(self, contents: Sequence[Content]) -> dict[ContentHash, Embedded | ImageRejected]:
        """Decode and embed, all of them in one call of the model."""
        with timed(6, "decode") as decoding:
            decoded = await self._decoder.decode([content.data for content in contents])
        decode_ms = 1000 * decoding.seconds / max(1, len(contents))
        results: dict[ContentHash, Embedded | ImageRejected] = {}
        good: list[tuple[ContentHash, Decoded]] = []
        for content, result in zip(contents, decoded, strict=True):
            if isinstance(result, ImageRejected):
                results[content.content_hash] = result
            else:
                good.append((content.content_hash, result))
        if not good:
            return results
        with timed(7, "embed") as embedding:
            vectors = await self._embedder.embed(np.stack([result.pixels for _, result in good]))
        timings = {"decode": decode_ms, "embed": 1000 * embedding.seconds / len(good)}
        for (content_hash, result), vector in zip(good, vectors, strict=True):
            results[content_hash] = Embedded(Facts(result.width, result.height, result.format), vector, timings)
        return results


def count_vectors(*, embedded: int, reused: int) -> None:
    VECTORS.labels("embedded").inc(embedded)
    VECTORS.labels("reused").inc(reused)
