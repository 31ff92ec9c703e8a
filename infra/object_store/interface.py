"""What we need of an object store. `s3.py` is the real adapter, `memory.py` the twin; one contract suite holds both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from schemas.identity import ObjectRef


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """An object as its store describes it, the same from a listing, a stat and a read, but for the last two fields.

    `etag` is unquoted. `put_time_us` is Last-Modified, in microseconds, floored to the second. `version` and `content_type` are
    None from a listing, which does not tell them.
    """

    ref: ObjectRef
    etag: str
    put_time_us: int
    size: int
    version: str | None = None
    content_type: str | None = None

    @property
    def is_directory_marker(self) -> bool:
        return self.ref.key.endswith("/")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Bytes, and the description that came with those very bytes (not from an earlier stat: it may be overwritten)."""

    stat: ObjectStat
    data: bytes


@dataclass(frozen=True, slots=True)
class NotificationRule:
    """Which events of a bucket's objects its store announces to a target. `target` is an ARN that the store gave it."""

    target: str
    events: frozenset[str]
    rule_id: str = ""
    prefix: str = ""
    suffix: str = ""

    def says_the_same(self, other: NotificationRule) -> bool:
        """Whatever it is called."""
        return replace(self, rule_id="") == replace(other, rule_id="")


@dataclass(frozen=True, slots=True)
class Over:
    """What a put may take the place of: the object with this ETag, or nothing at all (None)."""

    etag: str | None


@dataclass(frozen=True, slots=True)
class ObjectStream:
    stat: ObjectStat
    chunks: AsyncIterator[bytes]


class ObjectStore(Protocol):
    """Every method raises StoreUnavailable, or StoreRefused for a missing bucket and for denied access.

    Those with a key raise ImageRejected(OBJECT_UNREADABLE) for one that no request can carry (names.py).
    Each call has its own time-out; none retries: the caller decides how long to wait.
    """

    async def read(self, ref: ObjectRef, *, max_bytes: int) -> StoredObject:
        """Raises ObjectGone, and ImageRejected(OBJECT_TOO_LARGE) before more than `max_bytes` are in memory."""

    def open(self, ref: ObjectRef) -> AbstractAsyncContextManager[ObjectStream]:
        """Stream an object's bytes. Raises ObjectGone on entering, StoreUnavailable also while its chunks are taken.

        Holds a connection until it is left, however slow its reader: bound how many are open.
        """

    async def stat(self, ref: ObjectRef) -> ObjectStat:
        """Raises ObjectGone."""

    async def presigned_url(self, ref: ObjectRef, *, seconds: int) -> str:
        """Where the store gives these bytes to anyone for so long, at its public address. Asks nobody; raises ImageRejected for
        a key that no address can name."""

    async def put(self, ref: ObjectRef, data: bytes, content_type: str = "application/octet-stream") -> ObjectStat:
        """Describes what was put, even if another writer came right behind. Never makes a bucket."""

    async def put_stream(
        self,
        ref: ObjectRef,
        chunks: AsyncIterator[bytes],
        *,
        size: int,
        content_type: str,
        within_seconds: float,
        over: Over | None = None,
    ) -> str:
        """The ETag of what was put: exactly `size` bytes, or nothing. Whatever `chunks` raises is raised, and nothing is put.

        Holds a chunk in memory, never the object. `within_seconds` bounds the sending. Raises ObjectChanged when `over` does
        not hold: surely where it did not hold before, and against writers at the same moment where the store can tell.
        """

    async def delete(self, ref: ObjectRef) -> None:
        """Deleting what is not there is no error."""

    def list_pages(self, bucket: str, *, prefix: str = "", start_after: str | None = None) -> AsyncIterator[list[ObjectStat]]:
        """Pages of current objects, at most 1,000 each, in the store's own stable order.

        SeaweedFS walks folders, so `a/b` may come before `a-b`: nothing may rely on byte order, only on `start_after`
        continuing behind a key that an earlier page ended with.
        """

    async def check(self, bucket: str) -> None:
        """Returns when the store answers for this bucket."""

    async def ensure_bucket(self, bucket: str) -> None: ...

    async def notification_rules(self, bucket: str) -> list[NotificationRule]:
        """Raises StoreRefused also for a bucket with rules of a kind that cannot be told here, and would be lost by setting."""

    async def set_notification_rules(self, bucket: str, rules: Sequence[NotificationRule]) -> None:
        """These take the place of all that were there: a store knows no adding. Raises StoreRefused for an unknown target."""

    async def close(self) -> None: ...
