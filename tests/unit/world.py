"""A whole deployment in memory: the twins of all stores, the real pipeline, and a bucket that others write to."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import numpy as np

from infra.errors import ImageRejected
from infra.kafka.interface import Record
from infra.kafka.memory import MemoryBroker
from infra.metadata_store.interface import ImageRow, ModelRow
from infra.metadata_store.memory import MemoryMetadataStore
from infra.object_store.memory import MemoryObjectStore
from infra.vector_store.memory import MemoryVectorStore
from processors.decode import Decoded
from processors.embedding.embedder import Pixels, Vectors
from processors.outcomes import RowMaker
from processors.pipeline import AfterStep, Pipeline
from processors.progress import Progress
from processors.publishing import Publisher
from processors.reading import Reader, ReadingRules
from processors.vectors import Vectorizer
from processors.work import Delivery
from schemas.events import Cause, ObjectChange, ObjectEvent, OutcomeEvent, ReasonCode
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef
from schemas.tables import KEPT_STATES, ModelState
from schemas.topics import ALL_TOPICS, DEAD_LETTERS, OUTCOMES, Topic

BUCKET = "images"
COLLECTION = "images_test_v1"
MODEL = ModelFingerprint("f" * 64)
DIMENSION = 8
BROKEN = b"broken"


class ByteDecoder:
    """Stands for the decode pool: what starts with `broken` is rejected, all else becomes pixels of its hash."""

    def __init__(self) -> None:
        self.decoded: list[bytes] = []

    async def decode(self, items: Sequence[bytes]) -> list[Decoded | ImageRejected]:
        self.decoded += items
        return [self._one(item) for item in items]

    @staticmethod
    def _one(item: bytes) -> Decoded | ImageRejected:
        if item.startswith(BROKEN):
            return ImageRejected(ReasonCode.CORRUPT_IMAGE, "the picture is damaged")
        pixels = np.frombuffer(hashlib.sha256(item).digest()[: 3 * DIMENSION], dtype=np.uint8).reshape(1, DIMENSION, 3)
        return Decoded(pixels=pixels, width=40, height=30, format="JPEG")


class HashEmbedder:
    """Stands for the model: pixels to unit vectors, different pictures far from each other."""

    fingerprint = MODEL
    dimension = DIMENSION
    input_size = (1, DIMENSION)

    async def embed(self, pixels: Pixels) -> Vectors:
        return np.stack([vector_of_pixels(one) for one in pixels])

    async def close(self) -> None:
        return None


def vector_of_pixels(pixels: Pixels) -> Vectors:
    flat = pixels.astype(np.float32).reshape(-1)[:DIMENSION] - 127.5
    return np.asarray(flat / np.linalg.norm(flat), dtype=np.float32)


def vector_of(data: bytes) -> Vectors:
    decoded = ByteDecoder._one(data)
    assert isinstance(decoded, Decoded)
    return vector_of_pixels(decoded.pixels)


def event_for(ref: ObjectRef, *, cause: Cause = Cause.NOTIFICATION, **hints: object) -> ObjectEvent:
    change = ObjectChange.model_validate({"bucket": ref.bucket, "key": ref.key, "cause": cause, **hints})
    return ObjectEvent(id="1", source="/image-search/test/images", subject=str(ref), time=datetime.now(UTC), data=change)


class World:
    def __init__(self) -> None:
        self.objects = MemoryObjectStore(BUCKET)
        self.metadata = MemoryMetadataStore()
        self.vectors = MemoryVectorStore()
        self.broker = MemoryBroker()
        self.decoder = ByteDecoder()
        self.progress = Progress()
        self._offset = 0

    async def start(self) -> World:
        await self.vectors.create_collection(COLLECTION, dimension=DIMENSION)
        await self.metadata.add_model(
            ModelRow(MODEL, "bytes", COLLECTION, DIMENSION, "none", "fp32", {}, ModelState.ACTIVE, created_at_us=1)
        )
        await self.broker.ensure_topics(ALL_TOPICS, partitions=2, replication=1)
        self.producer = await self.broker.producer()
        return self

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[list[Vectorizer]]:
        """Those of the table, as a worker does; the active one first."""
        rows = await self.metadata.models(KEPT_STATES)
        yield [
            Vectorizer(
                row,
                vectors=self.vectors,
                decoder=self.decoder,
                embedder=HashEmbedder(),
                on_wait=self.progress.waited,
            )
            for row in sorted(rows, key=lambda row: row.state is not ModelState.ACTIVE)
        ]

    async def add_model(self, fingerprint: ModelFingerprint, state: ModelState = ModelState.FILLING) -> ModelRow:
        collection = f"of_{fingerprint[:8]}"
        await self.vectors.create_collection(collection, dimension=DIMENSION)
        row = ModelRow(fingerprint, "another", collection, DIMENSION, "none", "fp32", {}, state, created_at_us=2)
        return await self.metadata.add_model(row)

    def pipeline(self, after_step: AfterStep | None = None, *, exclude: tuple[str, ...] = ()) -> Pipeline:
        rules = ReadingRules(1000, 4, read_give_up_seconds=0.0, include=("*",), exclude=exclude)
        arguments = {"after_step": after_step} if after_step else {}
        return Pipeline(
            reader=Reader(self.objects, rules, on_wait=self.progress.waited),
            models=self,
            metadata=self.metadata,
            vectors=self.vectors,
            publisher=Publisher(self.producer, self.metadata, self.progress),
            rows=RowMaker("test"),
            batch_bytes=10_000,
            progress=self.progress,
            **arguments,
        )

    def delivery(self, value: bytes, key: bytes = b"") -> Delivery:
        self._offset += 1
        return Delivery("objects", 0, self._offset, 0, key, value)

    def event(self, ref: ObjectRef, *, cause: Cause = Cause.NOTIFICATION, **hints: object) -> Delivery:
        return self.delivery(event_for(ref, cause=cause, **hints).to_json(), ref.topic_key)

    async def put(self, key: str, data: bytes) -> Delivery:
        """Put an object and return the notification about it."""
        ref = ObjectRef(BUCKET, key)
        stat = await self.objects.put(ref, data)
        put_time = datetime.fromtimestamp(stat.put_time_us / 1e6, UTC)
        return self.event(ref, etag=stat.etag, put_time=put_time, size=stat.size)

    async def remove(self, key: str) -> Delivery:
        ref = ObjectRef(BUCKET, key)
        await self.objects.delete(ref)
        return self.event(ref, removed=True)

    async def row(self, key: str) -> ImageRow | None:
        ref = ObjectRef(BUCKET, key)
        return (await self.metadata.rows([ref.object_id])).get(ref.object_id)

    async def vector_content(self, key: str, collection: str = COLLECTION) -> ContentHash | None:
        object_id = ObjectRef(BUCKET, key).object_id
        stored = await self.vectors.fetch(collection, [object_id])
        return stored[object_id].content_hash if object_id in stored else None

    async def outcomes(self) -> list[OutcomeEvent]:
        return [OutcomeEvent.model_validate_json(record.value) for record in await self._records(OUTCOMES)]

    async def dead_letters(self) -> list[Record]:
        return await self._records(DEAD_LETTERS)

    async def _records(self, topic: Topic) -> list[Record]:
        offsets = await self.broker.offsets(topic)
        left = sum(end - begin for begin, end in offsets.values())
        found: list[Record] = []
        async with self.broker.read(topic, {partition: begin for partition, (begin, _) in offsets.items()}) as pages:
            while len(found) < left:
                found += await anext(pages)
        return found
