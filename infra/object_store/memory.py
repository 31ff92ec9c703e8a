"""The twin of the S3 store, in memory: for tests that need no server, held to the same contract suite."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from enum import StrEnum
from urllib.parse import quote

from infra.errors import ImageRejected, ObjectChanged, ObjectGone, StoreRefused, StoreUnavailable
from infra.object_store.interface import NotificationRule, ObjectStat, ObjectStream, Over, StoredObject
from infra.object_store.names import check_bucket_name, check_place
from schemas.events import ReasonCode
from schemas.identity import ObjectRef

PAGE_SIZE = 1000
CHUNK_BYTES = 64 * 1024


class Operation(StrEnum):
    READ = "read"
    OPEN = "open"
    STAT = "stat"
    PUT = "put"
    DELETE = "delete"
    LIST = "list"
    CHECK = "check"
    ENSURE_BUCKET = "ensure_bucket"
    RULES = "rules"
    SET_RULES = "set_rules"


FaultHook = Callable[[Operation, str, str | None], Awaitable[None]]
"""Awaited before each operation with bucket and key (None for a whole bucket; a listing: once a page).

It may raise, wait, or change the store, as other clients of a real one do.
"""


async def _no_fault(operation: Operation, bucket: str, key: str | None) -> None:
    return None


def _now_us() -> int:
    return time.time_ns() // 1000


class MemoryObjectStore:
    """See ObjectStore. Put times are whole seconds, as those of the real one. `before_call` may be set at any time.

    `targets` are the ARNs that its notification rules may name. It announces nothing.
    """

    def __init__(
        self,
        *buckets: str,
        now_us: Callable[[], int] = _now_us,
        page_size: int = PAGE_SIZE,
        targets: Collection[str] = (),
    ) -> None:
        self.before_call: FaultHook = _no_fault
        self._now_us = now_us
        self._page_size = page_size
        self._targets = frozenset(targets)
        self._buckets: dict[str, dict[str, StoredObject]] = {bucket: {} for bucket in buckets}
        self._rules: dict[str, tuple[NotificationRule, ...]] = {}

    async def read(self, ref: ObjectRef, *, max_bytes: int) -> StoredObject:
        await self._called(Operation.READ, ref)
        found = self._object(ref)
        if found.stat.size > max_bytes:
            raise ImageRejected(ReasonCode.OBJECT_TOO_LARGE, f"{found.stat.size} bytes; the limit is {max_bytes}")
        return found

    @asynccontextmanager
    async def open(self, ref: ObjectRef) -> AsyncIterator[ObjectStream]:
        await self._called(Operation.OPEN, ref)
        found = self._object(ref)
        async with aclosing(_chunks(found.data)) as chunks:
            yield ObjectStream(found.stat, chunks)

    async def presigned_url(self, ref: ObjectRef, *, seconds: int) -> str:
        check_place(ref)
        return f"http://objects.test/{ref.bucket}/{quote(ref.key, errors='surrogatepass')}?seconds={seconds}"

    async def stat(self, ref: ObjectRef) -> ObjectStat:
        await self._called(Operation.STAT, ref)
        return self._object(ref).stat

    async def put(self, ref: ObjectRef, data: bytes, content_type: str = "application/octet-stream") -> ObjectStat:
        await self._called(Operation.PUT, ref)
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        stat = ObjectStat(ref, etag, self._now_us() // 1_000_000 * 1_000_000, len(data), content_type=content_type)
        self._bucket(ref.bucket)[ref.key] = StoredObject(stat, bytes(data))
        return stat

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
        await self._called(Operation.PUT, ref)
        self._bucket(ref.bucket)
        data = b"".join([chunk async for chunk in chunks])
        if len(data) != size:
            raise StoreUnavailable("object store", "the body is not as long as it was said to be")
        present = self._bucket(ref.bucket).get(ref.key)
        if over is not None and over.etag != (None if present is None else present.stat.etag):
            raise ObjectChanged("another object is at this key")
        return (await self.put(ref, data, content_type)).etag

    async def delete(self, ref: ObjectRef) -> None:
        await self._called(Operation.DELETE, ref)
        self._bucket(ref.bucket).pop(ref.key, None)

    async def list_pages(
        self, bucket: str, *, prefix: str = "", start_after: str | None = None
    ) -> AsyncIterator[list[ObjectStat]]:
        check_bucket_name(bucket)
        page: list[ObjectStat] | None = None
        while page is None or len(page) == self._page_size:
            await self.before_call(Operation.LIST, bucket, None)
            page = self._page(bucket, prefix, start_after)
            if page:
                start_after = page[-1].ref.key
                yield page

    async def check(self, bucket: str) -> None:
        check_bucket_name(bucket)
        await self.before_call(Operation.CHECK, bucket, None)
        self._bucket(bucket)

    async def ensure_bucket(self, bucket: str) -> None:
        check_bucket_name(bucket)
        await self.before_call(Operation.ENSURE_BUCKET, bucket, None)
        self._buckets.setdefault(bucket, {})

    async def notification_rules(self, bucket: str) -> list[NotificationRule]:
        check_bucket_name(bucket)
        await self.before_call(Operation.RULES, bucket, None)
        self._bucket(bucket)
        return list(self._rules.get(bucket, ()))

    async def set_notification_rules(self, bucket: str, rules: Sequence[NotificationRule]) -> None:
        check_bucket_name(bucket)
        await self.before_call(Operation.SET_RULES, bucket, None)
        self._bucket(bucket)
        if not {rule.target for rule in rules} <= self._targets:
            raise StoreRefused(ReasonCode.OBJECT_UNREADABLE, "the object store refuses the request (InvalidArgument)")
        self._rules[bucket] = tuple(rules)

    async def close(self) -> None:
        return None

    async def _called(self, operation: Operation, ref: ObjectRef) -> None:
        check_place(ref)
        await self.before_call(operation, ref.bucket, ref.key)

    def _bucket(self, bucket: str) -> dict[str, StoredObject]:
        if bucket not in self._buckets:
            raise StoreRefused(ReasonCode.BUCKET_NOT_FOUND, f"the bucket {bucket!r} is missing: make it")
        return self._buckets[bucket]

    def _object(self, ref: ObjectRef) -> StoredObject:
        found = self._bucket(ref.bucket).get(ref.key)
        if found is None:
            raise ObjectGone("there is no object at this key")
        return found

    def _page(self, bucket: str, prefix: str, start_after: str | None) -> list[ObjectStat]:
        keys = sorted(key for key in self._bucket(bucket) if key.startswith(prefix) and key > (start_after or ""))
        # A listing tells no content type, of the real store either.
        return [replace(self._bucket(bucket)[key].stat, content_type=None) for key in keys[: self._page_size]]


async def _chunks(data: bytes) -> AsyncGenerator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES):
        await asyncio.sleep(0)  # as over a network, others run between two chunks
        yield data[start : start + CHUNK_BYTES]
