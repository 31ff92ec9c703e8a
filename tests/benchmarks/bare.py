"""The other arm of each measurement: the same work without a service around it, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infra.vector_store.interface import VectorStore
from processors.decode import decode
from processors.embedding.embedder import Embedder, Pixels
from processors.raster import DecodeRules

BATCHES = (1, 8, 16, 32)


def pixels_of(pictures: Sequence[bytes], rules: DecodeRules) -> Pixels:
    return np.stack([decode(picture, rules).pixels for picture in pictures])


async def model_rate(embedder: Embedder, pixels: Pixels) -> tuple[float, dict[int, float]]:
    """Pictures a second of the bare model, by batch size, tensors in memory. The best counts, the others are shown."""
    rates: dict[int, float] = {}
    for batch in BATCHES:
        started = time.perf_counter()
        done = 0
        while time.perf_counter() - started < 2.0:
            offset = done % (len(pixels) - batch + 1)
            await embedder.embed(pixels[offset : offset + batch])
            done += batch
        rates[batch] = done / (time.perf_counter() - started)
    return max(rates.values()), rates


@dataclass(frozen=True, slots=True)
class BareSearch:
    """Decode, embed and search in one process: the least that any answer to a picture costs."""

    rules: DecodeRules
    embedder: Embedder
    vectors: VectorStore
    collection: str

    async def seconds(self, picture: bytes, limit: int) -> float:
        started = time.perf_counter()
        pixels = pixels_of([picture], self.rules)
        vector = (await self.embedder.embed(pixels))[0]
        await self.vectors.search(self.collection, vector, limit=limit)
        return time.perf_counter() - started
