"""What we need of a vector store. `milvus.py` is the real adapter, `memory.py` the twin; one contract suite holds both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.filter import Filter
from schemas.identity import ContentHash, ObjectId, ObjectRef
from schemas.vectors import StoredVector, Vector, VectorHit, VectorRow


@dataclass(frozen=True, slots=True)
class VectorEntry:
    """A stored row without its vector, for comparing collections with the other stores."""

    object_id: ObjectId
    ref: ObjectRef
    content_hash: ContentHash


class VectorStore(Protocol):
    """Collections are addressed by name. Every method raises StoreUnavailable. Rows are written by primary key only."""

    async def create_collection(self, name: str, *, dimension: int) -> None:
        """Create, index and load. Does nothing when it exists with this dimension; ConfigurationError with another."""

    async def has_collection(self, name: str) -> bool: ...

    async def drop_collection(self, name: str) -> None: ...

    async def upsert(self, name: str, rows: Sequence[VectorRow]) -> None:
        """The last of several rows with one id stands (the server would keep both)."""

    async def delete(self, name: str, ids: Collection[ObjectId]) -> None:
        """Deleting what is not there is no error."""

    async def fetch(self, name: str, ids: Collection[ObjectId], *, strong: bool = False) -> dict[ObjectId, StoredVector]:
        """Vector and content hash of these rows as of the same moment, so that one speaks for the other."""

    async def search(
        self, name: str, vector: Vector, *, limit: int, narrow: Filter = Filter(), strong: bool = False
    ) -> list[VectorHit]:
        """Nearest first, by cosine. `strong` waits until every acknowledged write is seen (a tick: 50-200 ms)."""

    async def page(self, name: str, *, after: ObjectId | None = None, limit: int = 1000) -> list[VectorEntry]:
        """Rows in the order of their ids, Strong. Two entries with one id would be a doubled vector."""

    async def count(self, name: str) -> int:
        """Strong."""

    async def check(self, name: str) -> None:
        """Returns when this collection answers a real search: the server's own health page says yes too early."""

    async def close(self) -> None: ...
