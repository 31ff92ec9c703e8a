"""Is a store still announcing its changes? An object of ours is put and removed now and then, and both must be announced.

Rules are taken away by people and by tools that set their own: nothing fails then, pictures only come late, by a scan. The
topic is read without a group, because with several bridges the group would hand the canary's notifications to another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

import structlog

from infra.errors import ImageSearchError, InvalidEvent, StoreUnavailable, TransientError
from infra.kafka.interface import Broker, Record
from infra.metrics import CANARY_FAILURES, CANARY_SECONDS
from infra.object_store.interface import ObjectStore
from ingest_bridge.notification_rules import plan_rules
from ingest_bridge.notifications.s3 import parse_message
from schemas.identity import RESERVED_PREFIX, ObjectRef
from schemas.topics import OBJECT_NOTIFICATIONS

log = structlog.get_logger(__name__)

WAIT_SECONDS = 10.0
"""A store's stored way takes three seconds."""


class Canary:
    """`name` is one for each bridge. `targets`: what each bucket's rules must name; none: rules are not looked at.

    `on_gap` is called when a change may have been missed: a scan has to look. It must not block.
    """

    def __init__(
        self,
        *,
        name: str,
        buckets: Sequence[str],
        targets: Sequence[str],
        interval_seconds: float,
        objects: ObjectStore,
        broker: Broker,
        on_gap: Callable[[], None],
        wait_seconds: float = WAIT_SECONDS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._key = f"{RESERVED_PREFIX}canary/{name}"
        self._buckets = buckets
        self._targets = targets
        self._interval_seconds = interval_seconds
        self._objects = objects
        self._broker = broker
        self._on_gap = on_gap
        self._wait_seconds = wait_seconds
        self._sleep = sleep
        self._problems: dict[str, str] = {}

    async def check(self) -> None:
        """Raises StoreUnavailable when the last try found something wrong."""
        if self._problems:
            raise StoreUnavailable("notifications", "; ".join(self._problems.values()))

    async def run(self) -> None:
        """For ever: at once, and at every interval."""
        while True:
            for bucket in self._buckets:
                try:
                    await self._look_at(bucket)
                except TransientError as error:
                    # A store that is away, or denies us the canary, is told of elsewhere, and says nothing about its rules.
                    log.warning("the canary could not be tried", bucket=bucket, reason=str(error))
            await self._sleep(self._interval_seconds)

    async def _look_at(self, bucket: str) -> None:
        problem = await self._rules_problem(bucket) or await self._fly(ObjectRef(bucket, self._key))
        if problem is None:
            self._problems.pop(bucket, None)
            return
        self._problems[bucket] = problem
        log.error("notifications may be missing", bucket=bucket, problem=problem)
        self._on_gap()

    async def _rules_problem(self, bucket: str) -> str | None:
        if not self._targets:
            return None
        plan = plan_rules(bucket, await self._objects.notification_rules(bucket), self._targets)
        if not plan.changes:
            return None
        CANARY_FAILURES.labels("rules").inc()
        return f"the notification rules of {bucket} are not as they shall be: run `image-search provision`"

    async def _fly(self, ref: ObjectRef) -> str | None:
        """What is wrong, if anything."""
        async with self._broker.read(OBJECT_NOTIFICATIONS, {}) as pages:
            try:
                await self._timed("put", lambda: self._objects.put(ref, b"canary"), pages, ref, removed=False)
                await self._timed("removal", lambda: self._objects.delete(ref), pages, ref, removed=True)
            except TimeoutError:
                CANARY_FAILURES.labels("unseen").inc()
                return f"a change in {ref.bucket} was not announced within {self._wait_seconds:g} s"
            finally:
                with suppress(ImageSearchError):
                    await self._objects.delete(ref)
        return None

    async def _timed(
        self,
        step: str,
        do: Callable[[], Awaitable[object]],
        pages: AsyncIterator[list[Record]],
        ref: ObjectRef,
        *,
        removed: bool,
    ) -> None:
        """From before the change to its announcement. Raises TimeoutError."""
        began = time.monotonic()
        await do()
        async with asyncio.timeout(self._wait_seconds):
            async for page in pages:
                if any(_announces(record, ref, removed=removed) for record in page):
                    CANARY_SECONDS.labels(step).observe(time.monotonic() - began)
                    return


def _announces(record: Record, ref: ObjectRef, *, removed: bool) -> bool:
    try:
        parsed = parse_message(record.value, deployment="canary", buckets=(ref.bucket,), reserved=True)
    except InvalidEvent:
        return False
    return any(event.data.ref == ref and event.data.removed is removed for event in parsed.events)
