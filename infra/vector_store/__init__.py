"""The vector store: one collection for each model, one row an object."""

from __future__ import annotations

from infra.settings import CommonSettings
from infra.vector_store.address import Address
from infra.vector_store.calls import Connection
from infra.vector_store.index import VectorIndex
from infra.vector_store.interface import VectorStore
from infra.vector_store.memory import MemoryVectorStore
from infra.vector_store.milvus import MilvusVectorStore

__all__ = ["MemoryVectorStore", "MilvusVectorStore", "VectorStore", "connect"]


async def connect(settings: CommonSettings) -> VectorStore:
    """Opens no connection yet. Raises ConfigurationError for a CA file that cannot be used."""
    return MilvusVectorStore(
        Connection(
            Address.from_settings(settings),
            settings.milvus_token.get_secret_value(),
            timeout_seconds=settings.milvus_timeout_seconds,
        ),
        VectorIndex.from_settings(settings),
    )
