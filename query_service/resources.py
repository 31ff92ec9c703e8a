"""What the query service is made of from outside: the real ones here, twins in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import structlog

from infra import kafka, metadata_store, object_store, vector_store
from infra.errors import ImageRejected
from infra.kafka.interface import Broker
from infra.metadata_store.interface import MetadataStore
from infra.object_store.interface import ObjectStore
from infra.settings import QuerySettings
from infra.vector_store.interface import VectorStore
from processors.decode_pool import DecodePool
from processors.embedding import open_embedder, prepare_model
from processors.embedding.embedder import Embedder, Pixels
from query_service.search import Decode
from schemas.identity import ModelFingerprint

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class QueryModel:
    """The way from bytes to vector, the very one that indexed pictures went."""

    fingerprint: ModelFingerprint
    name: str
    decode: Decode
    embedder: Embedder


@dataclass(frozen=True, slots=True)
class Resources:
    """How each is opened. A store is closed by its own `close`."""

    objects: Callable[[QuerySettings], Awaitable[ObjectStore]]
    metadata: Callable[[QuerySettings], Awaitable[MetadataStore]]
    vectors: Callable[[QuerySettings], Awaitable[VectorStore]]
    broker: Callable[[QuerySettings], Awaitable[Broker]]
    model: Callable[[QuerySettings], AbstractAsyncContextManager[QueryModel]]


@asynccontextmanager
async def open_model(settings: QuerySettings) -> AsyncIterator[QueryModel]:
    prepared = await prepare_model(settings, lambda line: log.info("model", step=line))
    embedder = await open_embedder(prepared, settings)
    pool = DecodePool.from_settings(prepared.decode_rules, settings)

    async def decode(data: bytes) -> Pixels:
        [outcome] = await pool.decode([data])
        if isinstance(outcome, ImageRejected):
            raise outcome
        return outcome.pixels[None]

    try:
        await pool.start()
        yield QueryModel(prepared.fingerprint, prepared.description.name, decode, embedder)
    finally:
        await pool.close()
        await embedder.close()


REAL = Resources(
    objects=object_store.connect,
    metadata=metadata_store.connect,
    vectors=vector_store.connect,
    broker=kafka.connect,
    model=open_model,
)
