"""The query service over the twins of all stores, with a model that one can do sums with: a picture is an angle."""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
from aiohttp.test_utils import TestServer
from aiohttp.web import BaseRunner

from infra.errors import ImageRejected
from infra.kafka.interface import Message
from infra.kafka.memory import MemoryBroker
from infra.metadata_store.interface import Cursor, ImageRow, ModelRow, RowWrite
from infra.metadata_store.memory import MemoryMetadataStore
from infra.object_store.memory import MemoryObjectStore
from infra.settings import CommonSettings, QuerySettings
from infra.vector_store.memory import MemoryVectorStore
from processors.decode_pool import Box
from processors.embedding.embedder import Pixels, Vectors
from query_service.recent import RecentVectors
from query_service.resources import QueryModel, Resources
from query_service.search import Decode, Searcher
from schemas.api import FreshnessStatus
from schemas.events import Cause, Outcome, OutcomeEvent, OutcomeType, ReasonCode, outcome_event
from schemas.identity import ModelFingerprint, ObjectRef, content_hash_of
from schemas.tables import ModelState, RowState
from schemas.topics import ALL_TOPICS, OUTCOMES
from schemas.vectors import Vector, VectorRow

BUCKET = "images"
FINGERPRINT = ModelFingerprint("f" * 64)
COLLECTION = "images_angles_v1"
PUT_TIME_US = 1_700_000_000_123_456

Opened = TypeVar("Opened")


def picture(angle: int) -> bytes:
    """A picture whose vector points this many degrees round the circle."""
    return b"picture %d" % angle


def vector_at(angle: float) -> Vector:
    return np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))], dtype=np.float32)


def score_between(one: float, other: float) -> float:
    return 100.0 * math.cos(math.radians(one - other))


async def decode(data: bytes, box: Box | None = None) -> Pixels:
    if not data:
        raise ImageRejected(ReasonCode.EMPTY_OBJECT, "The picture is empty.")
    if not data.startswith(b"picture "):
        raise ImageRejected(ReasonCode.NOT_AN_IMAGE, "This is no picture.")
    angle = int(data.removeprefix(b"picture "))
    if box is not None:
        # Of this picture's parts, the one at the left edge points where all of it does.
        angle += round(100 * box[0])
    return np.array([[[[angle // 256, angle % 256, 0]]]], dtype=np.uint8)


class AngleEmbedder:
    fingerprint = FINGERPRINT
    dimension = 2
    input_size = (1, 1)

    async def embed(self, pixels: Pixels) -> Vectors:
        return np.stack([vector_at(256 * int(one[0, 0, 0]) + int(one[0, 0, 1])) for one in pixels])

    async def close(self) -> None:
        return None


class NeverStale:
    def status(self) -> FreshnessStatus:
        return FreshnessStatus(indexed_through=datetime(2026, 1, 1, tzinfo=UTC), lag_ms=430, reason=None)


def active(fingerprint: ModelFingerprint = FINGERPRINT) -> ModelRow:
    return ModelRow(
        fingerprint=fingerprint,
        name="angles",
        collection=COLLECTION,
        dimension=2,
        backend="none",
        precision="fp32",
        description={},
        state=ModelState.ACTIVE,
        created_at_us=0,
    )


class Server(TestServer):
    """As the service's process runs it: aiohttp's own test server cancels the handler of a client that hangs up."""

    async def _make_runner(self, **options: Any) -> BaseRunner:
        return await super()._make_runner(**{**options, "handler_cancellation": False})


class QueryWorld:
    def __init__(self) -> None:
        self.objects = MemoryObjectStore(BUCKET)
        self.metadata = MemoryMetadataStore()
        self.vectors = MemoryVectorStore()
        self.broker = MemoryBroker(*ALL_TOPICS, partitions=4, idle_seconds=0.05)
        self.embedder = AngleEmbedder()
        self.decode: Decode = decode
        self.fingerprint = FINGERPRINT
        """Of the model that the service is set to."""

    async def start(self) -> QueryWorld:
        await self.vectors.create_collection(COLLECTION, dimension=2)
        await self.metadata.add_model(active())
        await self.metadata.save_cursor(f"seaweedfs/{BUCKET}", Cursor(position=PUT_TIME_US * 1000, clean=True))
        return self

    def searcher(self, recent: RecentVectors | None = None) -> Searcher:
        return Searcher(
            model=active(),
            decode=self.decode,
            embedder=self.embedder,
            recent=RecentVectors(0) if recent is None else recent,
            vectors=self.vectors,
            metadata=self.metadata,
            freshness=NeverStale(),
        )

    async def put(self, key: str, angle: int, *, bucket: str = BUCKET) -> ImageRow:
        """An object that is in its bucket, indexed, and published."""
        ref, data = ObjectRef(bucket, key), picture(angle)
        await self.objects.ensure_bucket(bucket)
        stat = await self.objects.put(ref, data)
        await self.add_vector(ref, data, angle)
        return await self.set_row(ref, data, etag=stat.etag)

    async def add_vector(self, ref: ObjectRef, data: bytes, angle: float) -> None:
        row = VectorRow(
            object_id=ref.object_id,
            vector=vector_at(angle),
            ref=ref,
            content_hash=content_hash_of(data),
            put_time_us=PUT_TIME_US,
            size=len(data),
            width=40,
            height=30,
            format="JPEG",
        )
        await self.vectors.upsert(COLLECTION, [row])

    async def set_row(
        self,
        ref: ObjectRef,
        data: bytes,
        *,
        state: RowState = RowState.INDEXED,
        etag: str | None = None,
        reason: ReasonCode | None = None,
    ) -> ImageRow:
        seen = (await self.metadata.rows([ref.object_id])).get(ref.object_id)
        generation = (seen.generation if seen else 0) + 1
        row = ImageRow(
            ref=ref,
            state=state,
            generation=generation,
            published_generation=generation,
            # Kept in every state: that a row is not indexed has to be reason enough to hide it.
            content_hash=content_hash_of(data),
            etag=etag or hashlib.md5(data, usedforsecurity=False).hexdigest(),
            put_time_us=PUT_TIME_US,
            size=len(data),
            format="JPEG",
            width=40,
            height=30,
            reason=reason,
        )
        await self.metadata.write([RowWrite(row, generation - 1, frozenset({FINGERPRINT}))])
        return row

    async def publish(
        self,
        key: str,
        generation: int = 1,
        kind: OutcomeType = OutcomeType.INDEXED,
        *,
        bucket: str = BUCKET,
        **known: Any,
    ) -> OutcomeEvent:
        """`known`: what the outcome tells of the object besides."""
        ref = ObjectRef(bucket, key)
        data = Outcome(
            bucket=bucket,
            key=key,
            object_id=ref.object_id.hex(),
            generation=generation,
            cause=Cause.NOTIFICATION,
            **known,
        )
        event = outcome_event(kind, "test", datetime(2026, 1, 1, tzinfo=UTC), data)
        await self.broker.send(OUTCOMES, [Message(ref.topic_key, event.to_json())])
        return event

    def resources(self) -> Resources:
        @asynccontextmanager
        async def model(_settings: QuerySettings, _row: ModelRow) -> AsyncIterator[QueryModel]:
            yield QueryModel(self.decode, self.embedder)

        return Resources(
            objects=_opening(self.objects),
            metadata=_opening(self.metadata),
            vectors=_opening(self.vectors),
            broker=_opening(self.broker),
            fingerprint=lambda _settings: self.fingerprint,
            model=model,
        )


def _opening(store: Opened) -> Callable[[CommonSettings], Awaitable[Opened]]:
    async def connect(_settings: CommonSettings) -> Opened:
        return store

    return connect
