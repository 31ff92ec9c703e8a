"""What the query service is made of from outside: the real ones here, twins in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from infra import kafka, metadata_store, object_store, vector_store
from infra.errors import ImageRejected
from infra.kafka.interface import Broker
from infra.metadata_store.interface import MetadataStore, ModelRow
from infra.object_store.interface import ObjectStore
from infra.settings import QuerySettings
from infra.vector_store.interface import VectorStore
from processors.decode_pool import Box
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.embedder import Embedder, Pixels
from processors.embedding.open_models import model_of_row
from query_service.search import Decode
from schemas.identity import ModelFingerprint


@dataclass(frozen=True, slots=True)
class QueryModel:
    """The way from bytes to vector of one model, the very one that indexed pictures went."""

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
    model: Callable[[QuerySettings, ModelRow], AbstractAsyncContextManager[QueryModel]]
    """Of a row of the table of models."""


@asynccontextmanager
async def open_model(settings: QuerySettings, row: ModelRow) -> AsyncIterator[QueryModel]:
    """Raises ConfigurationError that says what to do."""
    async with model_of_row(row, settings) as (pool, embedder):

        async def decode(data: bytes, box: Box | None) -> Pixels:
            [outcome] = await pool.decode([data], box)
            if isinstance(outcome, ImageRejected):
                raise outcome
            return outcome.pixels[None]

        yield QueryModel(decode, embedder)


def fingerprint_of(settings: QuerySettings) -> ModelFingerprint:
    """Raises ConfigurationError for a model that there is not."""
    return fingerprint(chosen(settings), precision_asked(settings))


REAL = Resources(
    objects=object_store.connect,
    metadata=metadata_store.connect,
    vectors=vector_store.connect,
    broker=kafka.connect,
    fingerprint=fingerprint_of,
    model=open_model,
)
