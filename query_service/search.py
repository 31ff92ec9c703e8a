"""The search, free of HTTP: picture → pixels → vector → nearest vectors → rows that confirm them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from infra.metadata_store.interface import ImageRow, MetadataStore, ModelRow
from infra.metrics import HITS_HIDDEN, SEARCH_STEP_SECONDS
from infra.tracing import note_step
from infra.vector_store.interface import VectorStore
from processors.embedding.embedder import Embedder, Pixels
from query_service.errors import RequestRefused
from query_service.freshness import Freshness
from query_service.recent import RecentVectors
from schemas.api import ErrorCode, Hit, SearchAnswer, SearchTimings, time_of_us
from schemas.filter import Filter
from schemas.identity import ObjectId
from schemas.tables import RowState
from schemas.vectors import Vector, VectorHit, distance_of, score_of

SPARE_HITS = 8
"""Fetched beyond the limit, or an eighth of it if that is more: rows may have changed since their vectors were written."""

FETCHES = 4
"""Times that a search asks again, each for twice as many, when its hits were hidden by their rows."""

LARGEST_FETCH = 16_384
"""What Milvus takes as a limit."""

Decode = Callable[[bytes], Awaitable[Pixels]]
"""Bytes to the prepared picture, shape (1, height, width, 3). Raises ImageRejected."""


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """`strong`: see every vector that was acknowledged before now, at the price of a tick of the vector store."""

    limit: int
    min_score: float | None = None
    narrow: Filter = Filter()
    strong: bool = False


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

    async def by_picture(self, data: bytes, request: SearchRequest) -> SearchAnswer:
        """Raises ImageRejected and StoreUnavailable."""
        steps = _Steps()

        async def embedded() -> Vector:
            pixels = await self._decode(data)
            steps.done("decode")
            vector: Vector = (await self._embedder.embed(pixels))[0]
            steps.done("embed")
            return vector

        vector = await self._recent.vector_of(data, self._embedder.fingerprint, embedded)
        return await self._answer(vector, request, steps, leave_out=())

    async def by_object(self, row: ImageRow, request: SearchRequest) -> SearchAnswer:
        """Search by what is stored of an object, which is left out of the answer.

        Raises RequestRefused (IMAGE_NOT_INDEXED) when there is no vector of the bytes that the row names.
        """
        steps = _Steps()
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
        return await self._answer(stored.vector, request, steps, leave_out={row.object_id})

    async def _answer(
        self, vector: Vector, request: SearchRequest, steps: _Steps, leave_out: Collection[ObjectId]
    ) -> SearchAnswer:
        hits = await self._confirmed(vector, request, steps, leave_out)
        fresh = self._freshness.status()
        return SearchAnswer(
            hits=hits,
            limit=request.limit,
            total_is_exact=False,
            model=self.model.name,
            indexed_through=fresh.indexed_through,
            lag_ms=fresh.lag_ms,
            timing_ms=steps.timings,
        )

    async def _confirmed(
        self, vector: Vector, request: SearchRequest, steps: _Steps, leave_out: Collection[ObjectId]
    ) -> list[Hit]:
        looked_up = set(leave_out)
        confirmed: list[tuple[VectorHit, ImageRow]] = []
        fetch = request.limit + len(leave_out) + max(SPARE_HITS, request.limit // 8)
        for _ in range(FETCHES):
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
            confirmed += standing
            all_there = len(found) < fetch or not _good_enough(found[-1], request.min_score)
            if len(confirmed) >= request.limit or all_there or fetch == LARGEST_FETCH:
                break
            fetch = min(2 * fetch, LARGEST_FETCH)
        # A later fetch can bring something nearer that was written in between.
        confirmed.sort(key=lambda pair: -pair[0].similarity)
        return [_hit(hit, row) for hit, row in confirmed[: request.limit]]


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
