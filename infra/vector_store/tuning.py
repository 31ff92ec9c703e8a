"""A scratch collection beside one's own, in which indexes are tried on a copy of its vectors."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
from pymilvus import AsyncMilvusClient, DataType  # type: ignore[import-untyped]  # it has no types

from infra.settings import CommonSettings
from infra.vector_store.address import Address
from infra.vector_store.calls import Connection
from infra.vector_store.index import VectorIndex
from infra.vector_store.milvus import ROWS_AT_ONCE
from schemas.vectors import Vector

SCRATCH = "index_tuning_scratch_"
"""What every such name has in it, and no collection of the product."""

LEAST_ROWS = 1024
"""Milvus builds no index for fewer rows: each would look as good as the next."""

BUILD_TIMEOUT_SECONDS = 900.0

Matrix = npt.NDArray[np.float32]


class Scratch:
    """Row numbers of the copied vectors are its keys."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection, self.name = connection, name

    async def fill(self, vectors: Matrix, advance: Callable[[int], None]) -> None:
        """Written and sealed: only sealed data has an index."""

        async def create(client: AsyncMilvusClient, seconds: float) -> None:
            schema = AsyncMilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("number", DataType.INT64, is_primary=True)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
            await client.create_collection(self.name, schema=schema, num_shards=1, timeout=seconds)

        await self._connection.call(create, timeout_seconds=BUILD_TIMEOUT_SECONDS)
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            await self._write(start, vectors[start : start + ROWS_AT_ONCE])
            advance(min(ROWS_AT_ONCE, len(vectors) - start))
        await self._connection.call(
            lambda client, seconds: client.flush(self.name, timeout=seconds), timeout_seconds=BUILD_TIMEOUT_SECONDS
        )

    async def _write(self, start: int, vectors: Matrix) -> None:
        rows = [{"number": start + offset, "vector": vector} for offset, vector in enumerate(vectors)]
        await self._connection.call(lambda client, seconds: client.insert(self.name, rows, timeout=seconds))

    async def build(self, index: VectorIndex) -> None:
        """In place of the one before; built and loaded when it returns."""

        async def build(client: AsyncMilvusClient, seconds: float) -> None:
            await client.release_collection(self.name, timeout=seconds)
            for name in await client.list_indexes(self.name, timeout=seconds):
                await client.drop_index(self.name, name, timeout=seconds)
            parameters = client.prepare_index_params()
            parameters.add_index("vector", index_type=index.kind, metric_type="COSINE", params=index.build_parameters)
            await client.create_index(self.name, parameters, timeout=seconds)
            await client.load_collection(self.name, timeout=seconds)

        await self._connection.call(build, timeout_seconds=BUILD_TIMEOUT_SECONDS)

    async def search(self, vector: Vector, index: VectorIndex, limit: int) -> list[int]:
        """The numbers of the nearest, as our own searches ask for them."""

        async def ask(client: AsyncMilvusClient, seconds: float) -> list[int]:
            found = await client.search(
                self.name,
                [vector],
                limit=limit,
                search_params={"metric_type": "COSINE", "params": index.search_parameters(limit)},
                anns_field="vector",
                consistency_level="Bounded",
                timeout=seconds,
            )
            return [int(hit["id"]) for hit in found[0]]

        return await self._connection.call(ask)

    async def drop(self) -> None:
        await _drop(self._connection, self.name)


@asynccontextmanager
async def scratch_collection(settings: CommonSettings) -> AsyncIterator[Scratch]:
    """Nothing is made yet; whatever is made is gone afterwards, also after an error or when the task is cancelled."""
    connection = _connection(settings)
    scratch = Scratch(connection, f"{settings.milvus_collection_prefix}{SCRATCH}{secrets.token_hex(4)}")
    try:
        yield scratch
    finally:
        try:
            await scratch.drop()
        finally:
            await connection.close()


async def remove_left_over(settings: CommonSettings) -> list[str]:
    """Drops what a killed run left behind, and one that is under way. Names of what was dropped."""
    connection = _connection(settings)
    try:
        found: list[str] = await connection.call(lambda client, seconds: client.list_collections(timeout=seconds))
        names = sorted(name for name in found if name.startswith(f"{settings.milvus_collection_prefix}{SCRATCH}"))
        for name in names:
            await _drop(connection, name)
        return names
    finally:
        await connection.close()


async def _drop(connection: Connection, name: str) -> None:
    """Dropping what is not there is no error."""
    await connection.call(lambda client, seconds: client.drop_collection(name, timeout=seconds))


def _connection(settings: CommonSettings) -> Connection:
    token, seconds = settings.milvus_token.get_secret_value(), settings.milvus_timeout_seconds
    return Connection(Address.from_settings(settings), token, timeout_seconds=seconds)
