"""Which objects a listing had, at eight bytes each: ten million objects take 80 MB."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from schemas.identity import ObjectId

_DIGEST_BYTES = 8


class ObjectIdSet:
    """Filled with `add`, then asked with `has`; both may alternate, but each turn sorts anew.

    Ids are hashes, so their first eight bytes tell objects apart: for a given id, another of ten million has the same ones
    with a chance of 5 in 10^13. Whoever asks must be able to bear that.
    """

    def __init__(self) -> None:
        self._digests = array("Q")
        self._sorted: np.ndarray[tuple[int], np.dtype[np.uint64]] | None = None

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, ids: Iterable[ObjectId]) -> None:
        self._sorted = None
        self._digests.extend(_digest(object_id) for object_id in ids)

    def has(self, ids: Iterable[ObjectId]) -> list[bool]:
        """For each of these ids whether it was added."""
        if self._sorted is None:
            self._sorted = np.sort(np.frombuffer(self._digests, dtype=np.uint64)) if self._digests else np.empty(0, np.uint64)
        wanted = np.fromiter((_digest(object_id) for object_id in ids), dtype=np.uint64)
        if not len(self._sorted):
            return [False] * len(wanted)
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return [bool(same) for same in self._sorted[places] == wanted]


def _digest(object_id: ObjectId) -> int:
    return int.from_bytes(object_id[:_DIGEST_BYTES], "big")
