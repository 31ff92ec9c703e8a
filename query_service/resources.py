"""What the query service is made of from outside: the real ones here, twins in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
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
from processors.embedding import check_golden, open_embedder, prepare_model
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen
from processors.embedding.embedder import Embedder, Pixels
from query_service.search import Decode
from schemas.identity import ModelFingerprint

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class QueryModel:
    """The way from bytes to vector, the very one that indexed pictures went."""

    decode: Decode
    embedder: Embedder


@dataclass(frozen=True, slots=True)
class Resources:
    """How each is opened. A store is closed by its own `close`."""

    objects: Callable[[QuerySettings], Awaitable[ObjectStore]]
    metadata: Callable[[QuerySettings], Awaitable[MetadataStore]]
    vectors: Callable[[QuerySettings], Awaitable[VectorStore]]
    broker: Callable[[QuerySettings], Awaitable[Broker]]
    fingerprint: Callable[[QuerySettings], ModelFingerprint]
    """Of the model that the settings name; known before any of its files are there."""
    model: Callable[[QuerySettings], AbstractAsyncContextManager[QueryModel]]


@asynccontextmanager
async def open_model(settings: QuerySettings) -> AsyncIterator[QueryModel]:
    """Raises ConfigurationError that says what to do."""

    def say(line: str) -> None:
        log.info("model", step=line)

    prepared = await prepare_model(settings, say)
    async with AsyncExitStack() as stack:
        embedder = await open_embedder(prepared.description, settings, say)
        stack.push_async_callback(embedder.close)
        await check_golden(embedder, prepared.description)
        pool = DecodePool.from_settings(prepared.description.decode_rules(settings), settings)
        stack.push_async_callback(pool.close)
        await pool.start()

        async def decode(data: bytes) -> Pixels:
            [outcome] = await pool.decode([data])
            if isinstance(outcome, ImageRejected):
                raise outcome
            return outcome.pixels[None]

        yield QueryModel(decode, embedder)


def fingerprint_of(settings: QuerySettings) -> ModelFingerprint:
    """Raises ConfigurationError for a model that there is not."""
    return fingerprint(chosen(settings), settings.model_precision)


REAL = Resources(
    objects=object_store.connect,
    metadata=metadata_store.connect,
    vectors=vector_store.connect,
    broker=kafka.connect,
    fingerprint=fingerprint_of,
    model=open_model,
)
