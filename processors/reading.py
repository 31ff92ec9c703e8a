"""Step 4: the bytes of each object with the etag of those very bytes, within limits of number, size and time."""

from __future__ import annotations

import asyncio
import fnmatch
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infra.errors import ImageRejected, ObjectGone, StoreRefused, StoreUnavailable, TransientError
from infra.object_store.interface import ObjectStat, ObjectStore, StoredObject
from infra.retry import until_done
from processors.work import Failure, Gone, Ignored, Unreachable, Work
from schemas.events import ReasonCode
from schemas.identity import ObjectRef

Read = StoredObject | Failure | Ignored | Gone | Unreachable


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """Limits, each a setting of the same name."""

    max_object_bytes: int
    read_concurrency: int
    read_give_up_seconds: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def excludes(self, key: str) -> bool:
        """Patterns are case-sensitive, as keys are."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.exclude) or not any(
            fnmatch.fnmatchcase(key, pattern) for pattern in self.include
        )


class Reader:
    """Reads objects; waits out a store that is down, and gives up on an object that its well store does not give."""

    def __init__(
        self,
        store: ObjectStore,
        rules: ReadingRules,
        *,
        on_wait: Callable[[TransientError, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rules, self._on_wait, self._clock = store, rules, on_wait, clock
        self._places = asyncio.Semaphore(rules.read_concurrency)

    async def read_all(self, works: Sequence[Work]) -> list[Read]:
        return await asyncio.gather(*(self._read(work) for work in works))

    async def _read(self, work: Work) -> Read:
        first_failure: float | None = None

        async def attempt() -> Read:
            nonlocal first_failure
            try:
                async with self._places:
                    return await self._read_once(work.ref)
            except (StoreRefused, StoreUnavailable) as error:
                first_failure = self._clock() if first_failure is None else first_failure
                if self._clock() - first_failure >= self._rules.read_give_up_seconds and await self._is_its_own_fault(
                    work.ref, error
                ):
                    reason = error.reason if isinstance(error, StoreRefused) else ReasonCode.OBJECT_UNREADABLE
                    return Unreachable(reason, _why(reason, work.ref))
                raise

        return await until_done(attempt, on_wait=self._on_wait)

    async def _is_its_own_fault(self, ref: ObjectRef, error: TransientError) -> bool:
        """Whether the store is well although this object cannot be had. A store that is down is waited for instead."""
        if isinstance(error, StoreRefused):
            return True
        try:
            await self._store.check(ref.bucket)
        except TransientError:
            return False
        return True

    async def _read_once(self, ref: ObjectRef) -> Read:
        try:
            if ref.key.endswith("/"):
                stat = await self._store.stat(ref)
                return Ignored(ReasonCode.DIRECTORY_MARKER, "the key ends with a slash: a folder, not a picture", stat)
            if self._rules.excludes(ref.key):
                stat = await self._store.stat(ref)
                return Ignored(ReasonCode.EXCLUDED_BY_RULE, "the key is left out by the include and exclude patterns", stat)
            return await self._read_bytes(ref)
        except ObjectGone:
            return Gone()
        except ImageRejected as rejected:
            return Failure(rejected.reason, str(rejected), None)

    async def _read_bytes(self, ref: ObjectRef) -> Read:
        try:
            stored = await self._store.read(ref, max_bytes=self._rules.max_object_bytes)
        except ImageRejected as rejected:
            return Failure(rejected.reason, str(rejected), await self._stat(ref))
        if not stored.data:
            return Failure(ReasonCode.EMPTY_OBJECT, "the object has no bytes", stored.stat)
        return stored

    async def _stat(self, ref: ObjectRef) -> ObjectStat | None:
        """None for a key that no request can carry, such as one with a segment `..`."""
        try:
            return await self._store.stat(ref)
        except ImageRejected:
            return None


def _why(reason: ReasonCode, ref: ObjectRef) -> str:
    if reason is ReasonCode.BUCKET_NOT_FOUND:
        return f"the bucket {ref.bucket} does not exist"
    if reason is ReasonCode.ACCESS_DENIED:
        return "the object store denies access to this object: check the policy of our access key"
    return "the object store answers, but not for this object"
