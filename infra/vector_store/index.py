"""How a collection's vectors are indexed, and how hard a search looks. Only what Milvus 2.3.5 and 2.6 both build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from infra.settings import CommonSettings

IndexKind: TypeAlias = Literal["HNSW", "IVF_FLAT", "IVF_SQ8", "FLAT"]

MOST_SEARCH_EFFORT = 32_768

_FLOAT_BYTES = 4
_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """`links` and `build_effort` are HNSW's M and efConstruction, `lists` is nlist of the IVF kinds: fixed when it is built.

    `search_effort` (the least ef) and `search_lists` (nprobe) may differ from search to search.
    """

    kind: IndexKind = "HNSW"
    links: int = 16
    build_effort: int = 200
    lists: int = 128
    search_effort: int = 64
    search_lists: int = 16

    @classmethod
    def from_settings(cls, settings: CommonSettings) -> VectorIndex:
        return cls(
            settings.milvus_index,
            settings.milvus_index_links,
            settings.milvus_index_build_effort,
            settings.milvus_index_lists,
            settings.milvus_search_effort,
            settings.milvus_search_lists,
        )

    @property
    def build_parameters(self) -> dict[str, int]:
        match self.kind:
            case "HNSW":
                return {"M": self.links, "efConstruction": self.build_effort}
            case "IVF_FLAT" | "IVF_SQ8":
                return {"nlist": self.lists}
            case "FLAT":
                return {}

    def search_parameters(self, limit: int) -> dict[str, int]:
        """Of every kind: each takes its own and lets the others lie, so nobody need ask what a collection was made with."""
        return {"ef": self.effort(limit), "nprobe": self.search_lists}

    def effort(self, limit: int) -> int:
        """HNSW's `ef`: below the limit an indexed segment refuses the search, at twice the limit it misses next to nothing."""
        return min(MOST_SEARCH_EFFORT, max(self.search_effort, 2 * limit))

    def memory_bytes(self, rows: int, dimension: int) -> int:
        """What the index holds in memory, by its form: the server tells no size of an indexed segment (2.3.5 says 0)."""
        vector = dimension * _FLOAT_BYTES
        match self.kind:
            case "HNSW":
                # Twice M links in the lowest layer; each layer above holds one row in M of the layer below, with M links.
                links = (2 * self.links + self.links / (self.links - 1)) * _FLOAT_BYTES
                return round(rows * (vector + links + _ID_BYTES))
            case "IVF_FLAT":
                return rows * (vector + _ID_BYTES) + self.lists * vector
            case "IVF_SQ8":
                return rows * (dimension + _ID_BYTES) + self.lists * vector
            case "FLAT":
                return rows * vector


DEFAULT_INDEX = VectorIndex()
