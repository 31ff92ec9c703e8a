"""The vector store without a server: exact search, one process, nothing kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from infra.errors import ConfigurationError
from infra.vector_store.interface import VectorEntry
from schemas.filter import Filter
from schemas.identity import ObjectId
from schemas.vectors import StoredVector, Vector, VectorHit, VectorRow


@dataclass
class _Collection:
    dimension: int
    rows: dict[ObjectId, VectorRow] = field(default_factory=dict)

    def checked(self, vector: Vector) -> Vector:
        if vector.shape != (self.dimension,) or not np.isfinite(vector).all():
            raise ValueError(f"not a vector of {self.dimension} finite numbers")
        return np.asarray(vector, dtype=np.float32)


class MemoryVectorStore:
    """Every read sees every write at once."""

    def __init__(self) -> None:
        self._collections: dict[str, _Collection] = {}

    async def create_collection(self, name: str, *, dimension: int) -> None:
        found = self._collections.setdefault(name, _Collection(dimension)).dimension
        if found != dimension:
            raise ConfigurationError(f"collection {name} has {found} dimensions, the model has {dimension}")

    async def has_collection(self, name: str) -> bool:
        return name in self._collections

    async def drop_collection(self, name: str) -> None:
        self._collections.pop(name, None)

    async def upsert(self, name: str, rows: Sequence[VectorRow]) -> None:
        collection = self._collection(name)
        for row in rows:
            collection.checked(row.vector)
        collection.rows.update({row.object_id: row for row in rows})

    async def delete(self, name: str, ids: Collection[ObjectId]) -> None:
        collection = self._collection(name)
        for object_id in ids:
            collection.rows.pop(object_id, None)

    async def fetch(self, name: str, ids: Collection[ObjectId], *, strong: bool = False) -> dict[ObjectId, StoredVector]:
        rows = self._collection(name).rows
        return {object_id: _stored(rows[object_id]) for object_id in ids if object_id in rows}

    async def search(
        self, name: str, vector: Vector, *, limit: int, narrow: Filter = Filter(), strong: bool = False
    ) -> list[VectorHit]:
        collection = self._collection(name)
        direction = _unit(collection.checked(vector))
        hits = [
            VectorHit(row.object_id, row.content_hash, float(np.dot(_unit(row.vector), direction)))
            for row in collection.rows.values()
            if narrow.matches(row)
        ]
        return sorted(hits, key=lambda hit: -hit.similarity)[:limit]

    async def page(self, name: str, *, after: ObjectId | None = None, limit: int = 1000) -> list[VectorEntry]:
        rows = self._collection(name).rows
        ids = sorted(object_id for object_id in rows if after is None or object_id > after)[:limit]
        return [VectorEntry(object_id, rows[object_id].ref, rows[object_id].content_hash) for object_id in ids]

    async def count(self, name: str) -> int:
        return len(self._collection(name).rows)

    async def check(self, name: str) -> None:
        self._collection(name)

    async def close(self) -> None:
        pass

    def _collection(self, name: str) -> _Collection:
        collection = self._collections.get(name)
        if collection is None:
            raise ConfigurationError("the vector collection is missing; run: image-search upgrade")
        return collection


def _stored(row: VectorRow) -> StoredVector:
    vector = np.array(row.vector, np.float32)
    return StoredVector(row.object_id, row.content_hash, vector, row.width, row.height, row.format)


def _unit(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length else vector
