"""The search, free of HTTP: picture → pixels → vector → nearest vectors → rows that confirm them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow
from infra.metrics import HITS_HIDDEN, SEARCH_STEP_SECONDS
from infra.tracing import note_step
from infra.vector_store.interface import VectorStore
from processors.embedding.embedder import Embedder, Pixels
from query_service.errors import RequestRefused
from query_service.freshness import Freshness
from query_service.recent import RecentVectors
from schemas.api import LARGEST_WINDOW, Box, ErrorCode, Hit, Include, SearchAnswer, SearchTimings, time_of_us
from schemas.filter import Filter
from schemas.identity import ContentHash, ObjectId
from schemas.tables import RowState
from schemas.vectors import Vector, VectorHit, distance_of, score_of

SPARE_HITS = 8
"""Fetched beyond the limit, or an eighth of it if that is more: rows may have changed since their vectors were written."""

FETCHES = 4
"""Times that a search asks again, each for twice as many, when its hits were hidden by their rows."""

LARGEST_FETCH = LARGEST_WINDOW
"""What Milvus takes as a limit."""

FETCHES_GROUPED = 8
"""The same with groups, which a picture put under many keys can fill: 256 times what was asked for."""

SHORTEST = 1e-6
"""What is left of examples that cancel each other out has no direction."""

Decode = Callable[[bytes, Box | None], Awaitable[Pixels]]
"""Bytes, or a box in them, to the prepared picture, shape (1, height, width, 3). Raises ImageRejected."""


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """`strong`: see every vector that was acknowledged before now, at the price of a tick of the vector store.

    `grouped`: of hits with the same bytes only the best.
    """

    limit: int
    offset: int = 0
    min_score: float | None = None
    grouped: bool = False
    include: frozenset[Include] = frozenset()
    narrow: Filter = Filter()
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """Bytes that are searched with, or only a box in them."""

    data: bytes
    box: Box | None = None


Sought = Picture | ImageRow | Vector
"""What is searched with: a picture, a stored object, or a vector of any length."""


class _Steps:
    """Milliseconds spent by step, and the same in the metrics and in the request's trace."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, step: str) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        SEARCH_STEP_SECONDS.labels(step).observe(seconds)
        note_step(step, seconds)
        self.milliseconds[step] = round(self.milliseconds.get(step, 0.0) + 1000.0 * seconds, 3)

    @property
    def timings(self) -> SearchTimings:
        return SearchTimings.model_validate(self.milliseconds)


def content_path(object_id: ObjectId) -> str:
    return f"/v1/images/{object_id.hex()}/content"


class Searcher:
    def __init__(
        self,
        *,
        model: ModelRow,
        decode: Decode,
        embedder: Embedder,
        recent: RecentVectors,
        vectors: VectorStore,
        metadata: MetadataStore,
        freshness: Freshness,
    ) -> None:
        self.model = model
        self._decode = decode
        self._embedder = embedder
        self._recent = recent
        self._vectors = vectors
        self._metadata = metadata
        self._freshness = freshness

    async def search(self, examples: Sequence[tuple[float, Sought]], request: SearchRequest) -> SearchAnswer:
        """What is like these, by their weights, and unlike those with a weight below 0. Stored objects are left out.

        Raises ImageRejected, StoreUnavailable, and RequestRefused: IMAGE_NOT_INDEXED, INVALID_VECTOR.
        """
        steps = _Steps()
        vector = await self._vector_of(examples, steps)
        rows = {sought.object_id for _, sought in examples if isinstance(sought, ImageRow)}
        return await self._answer(vector, request, steps, leave_out=rows)

    async def similarity(self, one: Sought, other: Sought) -> float:
        """The cosine of two. Raises as `search` does."""
        vectors = [await self._vector_of([(1.0, sought)], _Steps()) for sought in (one, other)]
        return float(np.clip(vectors[0] @ vectors[1], -1.0, 1.0))

    async def _vector_of(self, examples: Sequence[tuple[float, Sought]], steps: _Steps) -> Vector:
        if len(examples) == 1:
            return await self._one(examples[0][1], steps)
        total = np.zeros(self.model.dimension, dtype=np.float64)
        for weight, sought in examples:
            total += weight * await self._one(sought, steps)
        return _unit(total, "The examples cancel each other out.")

    async def _one(self, sought: Sought, steps: _Steps) -> Vector:
        if isinstance(sought, Picture):
            return await self._of_picture(sought, steps)
        if isinstance(sought, ImageRow):
            return await self._of_row(sought, steps)
        if len(sought) != self.model.dimension:
            raise RequestRefused(
                ErrorCode.INVALID_VECTOR,
                f"The model {self.model.name} has vectors of {self.model.dimension} floats, not {len(sought)}.",
                details={"dimension": self.model.dimension},
            )
        return _unit(sought.astype(np.float64), "A vector of zeros points nowhere.")

    async def _of_picture(self, picture: Picture, steps: _Steps) -> Vector:
        async def embedded() -> Vector:
            pixels = await self._decode(picture.data, picture.box)
            steps.done("decode")
            vector: Vector = (await self._embedder.embed(pixels))[0]
            steps.done("embed")
            return vector

        if picture.box is not None:
            # Known by its bytes alone, all of it would be taken for its part.
            return await embedded()
        return await self._recent.vector_of(picture.data, self._embedder.fingerprint, embedded)

    async def _of_row(self, row: ImageRow, steps: _Steps) -> Vector:
        """What is stored of an object. Raises RequestRefused when there is no vector of the bytes that the row names."""
        stored = (await self._vectors.fetch(self.model.collection, [row.object_id])).get(row.object_id)
        if row.state is not RowState.INDEXED or stored is None or stored.content_hash != row.content_hash:
            raise RequestRefused(
                ErrorCode.IMAGE_NOT_INDEXED,
                f"This object is {row.state}, with no vector to search by."
                if row.state is not RowState.INDEXED
                else "This object is just being written. Try again.",
                details={"state": row.state, "reason": row.reason},
            )
        steps.done("search")
        return stored.vector

    async def _answer(
        self, vector: Vector, request: SearchRequest, steps: _Steps, leave_out: Collection[ObjectId]
    ) -> SearchAnswer:
        found = await self._confirmed(vector, request, steps, leave_out)
        hits = [_hit(hit, row) for hit, row in found.pairs[request.offset : request.offset + request.limit]]
        fresh = self._freshness.status()
        return SearchAnswer(
            hits=hits,
            limit=request.limit,
            offset=request.offset,
            groups_exhausted=found.exhausted if request.grouped else None,
            total_is_exact=False,
            model=self.model.name,
            indexed_through=fresh.indexed_through,
            lag_ms=fresh.lag_ms,
            timing_ms=steps.timings,
        )

    async def _confirmed(
        self, vector: Vector, request: SearchRequest, steps: _Steps, leave_out: Collection[ObjectId]
    ) -> _Found:
        looked_up = set(leave_out)
        confirmed: list[tuple[VectorHit, ImageRow]] = []
        shown, all_there = confirmed, False
        wanted = request.offset + request.limit
        fetch = min(wanted + len(leave_out) + max(SPARE_HITS, wanted // 8), LARGEST_FETCH)
        for _ in range(FETCHES_GROUPED if request.grouped else FETCHES):
            found = await self._vectors.search(
                self.model.collection, vector, limit=fetch, narrow=request.narrow, strong=request.strong
            )
            steps.done("search")
            # By id, so that a doubled vector could not be shown twice.
            candidates = {
                hit.object_id: hit for hit in found if hit.object_id not in looked_up and _good_enough(hit, request.min_score)
            }
            looked_up |= candidates.keys()
            rows = await self._metadata.rows(candidates)
            steps.done("metadata")
            standing = [
                (hit, row)
                for hit in candidates.values()
                if (row := rows.get(hit.object_id)) and _stands_for(row, hit) and request.narrow.matches(row)
            ]
            HITS_HIDDEN.inc(len(candidates) - len(standing))
            # A later fetch can bring something nearer that was written in between.
            confirmed = sorted([*confirmed, *standing], key=lambda pair: -pair[0].similarity)
            shown = _best_of_each_content(confirmed) if request.grouped else confirmed
            all_there = len(found) < fetch or not _good_enough(found[-1], request.min_score)
            if len(shown) >= wanted or all_there or fetch == LARGEST_FETCH:
                break
            fetch = min(2 * fetch, LARGEST_FETCH)
        return _Found(shown, exhausted=all_there and len(shown) <= wanted)


@dataclass(frozen=True, slots=True)
class _Found:
    """`exhausted`: there is nothing beyond these."""

    pairs: list[tuple[VectorHit, ImageRow]]
    exhausted: bool


def _best_of_each_content(pairs: Sequence[tuple[VectorHit, ImageRow]]) -> list[tuple[VectorHit, ImageRow]]:
    best: dict[ContentHash, tuple[VectorHit, ImageRow]] = {}
    for hit, row in pairs:
        best.setdefault(hit.content_hash, (hit, row))
    return list(best.values())


def _unit(vector: npt.NDArray[np.float64], problem: str) -> Vector:
    length = float(np.linalg.norm(vector))
    if not length > SHORTEST:
        raise RequestRefused(ErrorCode.INVALID_VECTOR, problem)
    return (vector / length).astype(np.float32)


def _good_enough(hit: VectorHit, min_score: float | None) -> bool:
    return min_score is None or score_of(hit.similarity) >= min_score


def _stands_for(row: ImageRow, hit: VectorHit) -> bool:
    """Invariant 2, no ghosts: the row has the last word on whether an object is there and which bytes it has."""
    return row.state is RowState.INDEXED and row.content_hash == hit.content_hash


def _hit(hit: VectorHit, row: ImageRow) -> Hit:
    return Hit(
        id=row.object_id.hex(),
        bucket=row.ref.bucket,
        key=row.ref.key,
        score=round(score_of(hit.similarity), 4),
        distance=round(distance_of(hit.similarity), 6),
        content_hash=hit.content_hash.hex(),
        size=row.size,
        width=row.width,
        height=row.height,
        format=row.format,
        put_time=None if row.put_time_us is None else time_of_us(row.put_time_us),
        indexed_at=time_of_us(row.updated_at_us),
        url=content_path(row.object_id),
    )
