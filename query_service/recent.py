"""Vectors of the last query pictures: who searches with the same bytes again waits neither for a decoder nor for the model."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from infra.metrics import QUERY_VECTORS
from schemas.identity import ContentHash, ModelFingerprint, content_hash_of
from schemas.vectors import Vector

HASHED_HERE_BYTES = 256 * 1024
"""Larger pictures are hashed on a thread: a quarter of a megabyte takes as long as handing it over."""


class RecentVectors:
    """By content hash and model, so that another model never gets this one's. Holds no bytes of the pictures."""

    def __init__(self, most: int) -> None:
        """`most`: vectors that are kept; those not asked for the longest go first. 0: none, and nothing is hashed."""
        self._most = most
        self._vectors: OrderedDict[tuple[ModelFingerprint, ContentHash], Vector] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    async def vector_of(self, data: bytes, model: ModelFingerprint, embed: Callable[[], Awaitable[Vector]]) -> Vector:
        """The vector of these bytes, from `embed` when it is not known. Raises what that raises, and remembers none of it."""
        if self._most == 0:
            return await embed()
        key = (model, await _hash_of(data))
        vector = self._vectors.get(key)
        QUERY_VECTORS.labels("embedded" if vector is None else "recent").inc()
        if vector is None:
            # A copy: a row of a batch would keep the whole batch. Read-only: it is handed to many.
            vector = (await embed()).copy()
            vector.setflags(write=False)
            self._vectors[key] = vector
        self._vectors.move_to_end(key)
        if len(self._vectors) > self._most:
            self._vectors.popitem(last=False)
        return vector


async def _hash_of(data: bytes) -> ContentHash:
    if len(data) <= HASHED_HERE_BYTES:
        return content_hash_of(data)
    return await asyncio.to_thread(content_hash_of, data)
