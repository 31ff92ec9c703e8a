"""The vector store on Milvus 2.3.5 to 2.6: only what all of them have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from pymilvus import AsyncMilvusClient, CollectionSchema, DataType  # type: ignore[import-untyped]  # it has no types

from infra.errors import ConfigurationError
from infra.vector_store.calls import Connection
from infra.vector_store.expression import between, narrowed, one_of, stored_text
from infra.vector_store.index import DEFAULT_INDEX, VectorIndex
from infra.vector_store.interface import VectorEntry
from schemas.filter import Filter
from schemas.identity import ContentHash, ObjectId, ObjectRef, object_id_from_hex
from schemas.vectors import StoredVector, Vector, VectorHit, VectorRow

MOST_HITS = 16_384

# Rows of one request. 500 vectors of 2,048 floats are 4 MiB, of the 64 MiB that the server takes.
ROWS_AT_ONCE = 500
# Making an index and loading it takes seconds on an idle machine.
CREATE_TIMEOUT_SECONDS = 60.0

_ServerRow = dict[str, Any]

_BUCKET_BYTES, _KEY_BYTES, _FORMAT_BYTES, _HEX_BYTES = 63, 1024, 16, 64


class MilvusVectorStore:
    """Belongs to the event loop that first uses it. The server may come and go: no call needs a new store."""

    def __init__(self, connection: Connection, index: VectorIndex = DEFAULT_INDEX) -> None:
        """`index`: what collections are made with, and how hard every search looks."""
        self._connection, self._index = connection, index
        self._dimensions: dict[str, int] = {}

    async def create_collection(self, name: str, *, dimension: int) -> None:
        async def create(client: AsyncMilvusClient, seconds: float) -> None:
            if not await client.has_collection(name, timeout=seconds):
                await client.create_collection(name, schema=_schema(dimension), timeout=seconds, consistency_level="Bounded")
            # Each step on its own: a process that died in between left the rest to the next one.
            found = _dimension_of(await client.describe_collection(name, timeout=seconds))
            if found != dimension:
                raise ConfigurationError(f"collection {name} has {found} dimensions, the model has {dimension}")
            if not await client.list_indexes(name, timeout=seconds):
                index = client.prepare_index_params()
                parameters = self._index.build_parameters
                index.add_index("vector", index_type=self._index.kind, metric_type="COSINE", params=parameters)
                await client.create_index(name, index, timeout=seconds)
            await client.load_collection(name, timeout=seconds)

        await self._connection.call(create, timeout_seconds=CREATE_TIMEOUT_SECONDS)

    async def has_collection(self, name: str) -> bool:
        async def ask(client: AsyncMilvusClient, seconds: float) -> bool:
            return bool(await client.has_collection(name, timeout=seconds))

        return await self._connection.call(ask)

    async def drop_collection(self, name: str) -> None:
        async def drop(client: AsyncMilvusClient, seconds: float) -> None:
            await client.drop_collection(name, timeout=seconds)

        self._dimensions.pop(name, None)
        await self._connection.call(drop)

    async def upsert(self, name: str, rows: Sequence[VectorRow]) -> None:
        await self._check_vectors(name, [row.vector for row in rows])
        last_of_each = list({row.object_id: row for row in rows}.values())
        for chunk in _chunks(last_of_each):
            await self._upsert_chunk(name, [_written(row) for row in chunk])

    async def _upsert_chunk(self, name: str, data: list[dict[str, Any]]) -> None:
        async def write(client: AsyncMilvusClient, seconds: float) -> None:
            await client.upsert(name, data, timeout=seconds)

        await self._connection.call(write)

    async def delete(self, name: str, ids: Collection[ObjectId]) -> None:
        for chunk in _chunks(sorted(set(ids))):
            await self._delete_chunk(name, one_of(chunk))

    async def _delete_chunk(self, name: str, condition: str) -> None:
        async def write(client: AsyncMilvusClient, seconds: float) -> None:
            await client.delete(name, filter=condition, timeout=seconds)

        await self._connection.call(write)

    async def fetch(self, name: str, ids: Collection[ObjectId], *, strong: bool = False) -> dict[ObjectId, StoredVector]:
        found = {}
        for chunk in _chunks(sorted(set(ids))):
            fields = ["object_id", "content_hash", "vector", "width", "height", "format"]
            for row in await self._query(name, one_of(chunk), fields, strong=strong):
                stored = _stored(row)
                found[stored.object_id] = stored
        return found

    async def search(
        self, name: str, vector: Vector, *, limit: int, narrow: Filter = Filter(), strong: bool = False
    ) -> list[VectorHit]:
        if not 1 <= limit <= MOST_HITS:
            raise ValueError(f"limit must be from 1 to {MOST_HITS}")
        await self._check_vectors(name, [vector])

        async def ask(client: AsyncMilvusClient, seconds: float) -> list[list[_ServerRow]]:
            found: list[list[_ServerRow]] = await client.search(
                name,
                [np.asarray(vector, dtype=np.float32)],
                filter=narrowed(narrow),
                limit=limit,
                output_fields=["content_hash"],
                search_params={"metric_type": "COSINE", "params": self._index.search_parameters(limit)},
                anns_field="vector",
                consistency_level=_consistency(strong),
                timeout=seconds,
            )
            return found

        hits = (await self._connection.call(ask))[0]
        return [VectorHit(object_id_from_hex(hit["id"]), _content_hash(hit["entity"]), float(hit["distance"])) for hit in hits]

    async def page(self, name: str, *, after: ObjectId | None = None, limit: int = 1000) -> list[VectorEntry]:
        fields = ["object_id", "bucket", "key", "content_hash"]
        # A limit takes the lowest keys. Asking as the library's iterators do would read at an old timestamp, Strong or not.
        found = await self._query(name, between(after, None), fields, strong=True, limit=limit)
        entries = sorted((_entry(row) for row in found), key=lambda entry: entry.object_id)
        return await self._with_doubles(name, after, entries)

    async def count(self, name: str) -> int:
        return await self._count(name, "")

    async def check(self, name: str) -> None:
        direction = np.zeros(await self._dimension(name), dtype=np.float32)
        direction[0] = 1.0
        await self.search(name, direction, limit=1)

    async def close(self) -> None:
        await self._connection.close()

    async def _query(
        self, name: str, condition: str, fields: list[str], *, strong: bool, limit: int | None = None
    ) -> list[_ServerRow]:
        async def ask(client: AsyncMilvusClient, seconds: float) -> list[_ServerRow]:
            found: list[_ServerRow] = await client.query(
                name,
                filter=condition,
                output_fields=fields,
                consistency_level=_consistency(strong),
                timeout=seconds,
                **({} if limit is None else {"limit": limit}),
            )
            return found

        return await self._connection.call(ask)

    async def _count(self, name: str, condition: str) -> int:
        return int((await self._query(name, condition, ["count(*)"], strong=True))[0]["count(*)"])

    async def _with_doubles(self, name: str, after: ObjectId | None, entries: list[VectorEntry]) -> list[VectorEntry]:
        """A query shows one row of an id that is there twice; only a count of rows tells."""
        if not entries:
            return entries
        ids = [entry.object_id for entry in entries]
        if await self._count(name, between(after, ids[-1])) <= len(ids):
            return entries
        copies = await self._copies(name, ids)
        return [entry for entry in entries for _ in range(max(1, copies[entry.object_id]))]

    async def _copies(self, name: str, ids: list[ObjectId]) -> Counter[ObjectId]:
        """How many rows each of these ids has, found by halves: doubles are rare."""
        rows = await self._count(name, one_of(ids))
        if rows <= len(ids) or len(ids) == 1:
            return Counter({object_id: rows if len(ids) == 1 else 1 for object_id in ids})
        half = len(ids) // 2
        return await self._copies(name, ids[:half]) + await self._copies(name, ids[half:])

    async def _dimension(self, name: str) -> int:
        if name not in self._dimensions:
            description = await self._connection.call(lambda client, seconds: client.describe_collection(name, timeout=seconds))
            self._dimensions[name] = _dimension_of(description)
        return self._dimensions[name]

    async def _check_vectors(self, name: str, vectors: Sequence[Vector]) -> None:
        """The server answers these with the same code as a fault of its own, and a fault is tried again for ever."""
        dimension = await self._dimension(name)
        for vector in vectors:
            if vector.shape != (dimension,) or not np.isfinite(vector).all():
                raise ValueError(f"not a vector of {dimension} finite numbers")


def _schema(dimension: int) -> CollectionSchema:
    schema = AsyncMilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("object_id", DataType.VARCHAR, max_length=_HEX_BYTES, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
    schema.add_field("bucket", DataType.VARCHAR, max_length=_BUCKET_BYTES)
    schema.add_field("key", DataType.VARCHAR, max_length=_KEY_BYTES)
    schema.add_field("content_hash", DataType.VARCHAR, max_length=_HEX_BYTES)
    for name in ("put_time", "size", "width", "height"):
        schema.add_field(name, DataType.INT64)
    schema.add_field("format", DataType.VARCHAR, max_length=_FORMAT_BYTES)
    schema.add_field("metadata", DataType.JSON)
    return schema


def _dimension_of(description: dict[str, Any]) -> int:
    return next(int(field["params"]["dim"]) for field in description["fields"] if field["name"] == "vector")


def _written(row: VectorRow) -> dict[str, Any]:
    return {
        "object_id": row.object_id.hex(),
        "vector": np.asarray(row.vector, dtype=np.float32),
        "bucket": row.ref.bucket,
        "key": stored_text(row.ref.key),
        "content_hash": row.content_hash.hex(),
        "put_time": row.put_time_us,
        "size": row.size,
        "width": row.width,
        "height": row.height,
        "format": row.format,
        "metadata": {},
    }


def _entry(row: _ServerRow) -> VectorEntry:
    return VectorEntry(object_id_from_hex(row["object_id"]), ObjectRef(row["bucket"], row["key"]), _content_hash(row))


def _stored(row: _ServerRow) -> StoredVector:
    return StoredVector(
        object_id_from_hex(row["object_id"]),
        _content_hash(row),
        np.asarray(row["vector"], dtype=np.float32),
        width=row["width"],
        height=row["height"],
        format=row["format"],
    )


def _content_hash(row: _ServerRow) -> ContentHash:
    return ContentHash(bytes.fromhex(row["content_hash"]))


def _consistency(strong: bool) -> str:
    return "Strong" if strong else "Bounded"


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), ROWS_AT_ONCE):
        yield items[start : start + ROWS_AT_ONCE]
