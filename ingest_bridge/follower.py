"""Follows a SeaweedFS metadata log from a stored cursor and writes object events: nothing is lost while the log has it.

The log itself loses its last minute when the filer is killed, so a scan is asked for whenever the log had to be taken up
again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import structlog

from infra.errors import InvalidEvent, StoreUnavailable, TransientError
from infra.kafka.interface import Message, Producer
from infra.metadata_store.interface import Cursor, MetadataStore
from infra.metrics import DEAD_LETTERS as DEAD_LETTERS_COUNTED
from infra.metrics import RETRIES
from infra.retry import until_done
from ingest_bridge.announcing import Source, announced
from ingest_bridge.meta_tail import TailEnded
from ingest_bridge.notifications.seaweedfs import parse_document
from schemas.events import ObjectEvent
from schemas.tables import log_cursor_name
from schemas.topics import (
    DEAD_LETTERS,
    HEADER_ATTEMPT,
    HEADER_ERROR,
    HEADER_OFFSET,
    HEADER_PARTITION,
    HEADER_REASON,
    HEADER_TOPIC,
    OBJECTS,
)

log = structlog.get_logger(__name__)

STORE_NAME = "change log"
QUIET_SECONDS = 1.0
"""After a silence this long everything that was logged before it counts as handed over.

The filer delivers within milliseconds; a filer or child that was starved of its processor for longer would make the position
of an idle log too young by as much. Nothing is lost by that: the overlap of a restart and the scans do not rely on it.
"""
SETTLED_SECONDS = 3.0
"""The same, while catching up: the filer then reads files, and may pause between two of them."""
BEHIND_NS = 2_000_000_000
SAVE_SECONDS = 1.0
STOP_SAVE_SECONDS = 5.0
FIRST_RESTART_SECONDS = 0.2
LONGEST_RESTART_SECONDS = 5.0
REMEMBERED_IDS = 16_384
DEAD_LETTER_BYTES = 512 * 1024
"""A message larger than a broker's usual limit of 1 MiB would be refused, and hold up all behind it."""


class Tail(Protocol):
    """One run through the log, see meta_tail.MetaTail."""

    async def read(self, wait_seconds: float) -> list[bytes] | None: ...

    async def close(self) -> None: ...


StartTail = Callable[[int], Awaitable[Tail]]
"""Starts reading the log from this time on, nanoseconds."""


class Follower:
    """`on_gap` is called when something may be missing from the log: a scan has to look. It must not block."""

    def __init__(
        self,
        *,
        deployment: str,
        buckets: Sequence[str],
        overlap_seconds: float,
        start_tail: StartTail,
        producer: Producer,
        metadata: MetadataStore,
        on_gap: Callable[[], None],
        now_ns: Callable[[], int] = time.time_ns,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._deployment = deployment
        self._buckets = frozenset(buckets)
        self._overlap_ns = round(overlap_seconds * 1e9)
        self._start_tail = start_tail
        self._producer = producer
        self._metadata = metadata
        self._on_gap = on_gap
        self._now_ns = now_ns
        self._sleep = sleep
        self._position_ns = 0
        self._saved_at_ns = 0
        self._quiet_seconds = 0.0
        self._behind = True
        self._connected = False
        self._remembered: OrderedDict[str, None] = OrderedDict()

    @property
    def handed_over_until_ns(self) -> int:
        """Everything that the log said up to this time is in the topic. See QUIET_SECONDS for how far that is to be trusted."""
        return self._position_ns

    async def check(self) -> None:
        if not self._connected:
            raise StoreUnavailable(STORE_NAME, "it is not being followed just now")

    async def run(self) -> None:
        """Follow for ever. Cancelled, it stores the cursor as clean: what was read behind it will be read again."""
        self._position_ns = await self._load_position()
        await until_done(lambda: self._save(clean=False))
        try:
            await self._follow()
        finally:
            await self._save_at_stop()

    async def _follow(self) -> None:
        wait_seconds = FIRST_RESTART_SECONDS
        after_gap = False
        while True:
            try:
                await self._follow_once(after_gap)
            except TailEnded as ended:
                log.warning("the log ended and is taken up again", reason=str(ended))
            after_gap = True
            if self._connected:
                wait_seconds = FIRST_RESTART_SECONDS
            self._connected = False
            await self._sleep(wait_seconds * random.uniform(0.75, 1.0))  # noqa: S311 - jitter, not a secret
            wait_seconds = min(2 * wait_seconds, LONGEST_RESTART_SECONDS)

    async def _follow_once(self, after_gap: bool) -> None:
        """Until the log ends (TailEnded)."""
        self._quiet_seconds, self._behind = 0.0, True
        tail = await self._start_tail(self._position_ns - self._overlap_ns)
        try:
            while True:
                documents = await tail.read(QUIET_SECONDS)
                if not self._connected:
                    # A filer that does not answer ends the child within that time, so this one does answer.
                    self._connected = True
                    if after_gap:
                        self._on_gap()
                if documents is None:
                    self._advance_while_quiet()
                else:
                    await self._hand_over(documents)
                await self._save_now_and_then()
        finally:
            await tail.close()

    def _advance_while_quiet(self) -> None:
        self._quiet_seconds += QUIET_SECONDS
        if self._quiet_seconds >= (SETTLED_SECONDS if self._behind else QUIET_SECONDS):
            self._behind = False
            self._position_ns = max(self._position_ns, self._now_ns() - round(QUIET_SECONDS * 1e9))

    async def _hand_over(self, documents: Sequence[bytes]) -> None:
        """One send for all that was read. The position moves only when the broker has it."""
        self._quiet_seconds = 0.0
        position_ns = self._position_ns
        events: dict[str, ObjectEvent] = {}
        refused: list[Message] = []
        for document in documents:
            try:
                parsed = parse_document(document, deployment=self._deployment, buckets=self._buckets)
            except InvalidEvent as error:
                refused.append(_dead_letter(document, error, position_ns + len(refused)))
                DEAD_LETTERS_COUNTED.labels(error.reason).inc()
                continue
            position_ns = max(position_ns, parsed.position_ns)
            events.update((event.id, event) for event in parsed.events if event.id not in self._remembered)
        if events:
            with announced(events.values(), Source.LOG) as messages:
                await until_done(lambda: self._producer.send(OBJECTS, messages), on_wait=_broker_waited_for)
            self._remember(events)
        if refused:
            await until_done(lambda: self._producer.send(DEAD_LETTERS, refused), on_wait=_broker_waited_for)
            # What could not be understood may have been a change.
            self._on_gap()
        self._behind = self._now_ns() - position_ns > BEHIND_NS
        self._position_ns = position_ns

    def _remember(self, ids: Iterable[str]) -> None:
        self._remembered.update(dict.fromkeys(ids))
        while len(self._remembered) > REMEMBERED_IDS:
            self._remembered.popitem(last=False)

    async def _load_position(self) -> int:
        """Where the last run ended. Without one: now, and a scan takes in what is there."""
        cursors = await until_done(self._cursors)
        known = [cursor for cursor in cursors if cursor is not None]
        if not all(cursor.clean for cursor in known):
            log.warning("the last run did not end in order")
        return min((cursor.position for cursor in known), default=self._now_ns())

    async def _cursors(self) -> list[Cursor | None]:
        return [await self._metadata.cursor(log_cursor_name(bucket)) for bucket in self._buckets]

    async def _save_now_and_then(self) -> None:
        if self._now_ns() - self._saved_at_ns < SAVE_SECONDS * 1e9:
            return
        try:
            await self._save(clean=False)
        except TransientError as error:
            # The next one will do: an older cursor only means that more is read again.
            log.warning("the cursor could not be stored", reason=str(error))

    async def _save(self, *, clean: bool) -> None:
        for bucket in self._buckets:
            await self._metadata.save_cursor(log_cursor_name(bucket), Cursor(self._position_ns, clean))
        self._saved_at_ns = self._now_ns()

    async def _save_at_stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_SAVE_SECONDS):
                await self._save(clean=True)
        except (TransientError, TimeoutError) as error:
            log.warning("the cursor could not be stored", reason=str(error))


def _broker_waited_for(error: TransientError, attempt: int) -> None:
    RETRIES.labels("broker").inc()
    log.warning("waiting for the broker", reason=str(error), attempt=attempt)


def _dead_letter(document: bytes, error: InvalidEvent, position_ns: int) -> Message:
    headers = {
        # The log has neither topic nor offset: its name and about the place in it are the identity.
        HEADER_TOPIC: "seaweedfs",
        HEADER_PARTITION: "0",
        HEADER_OFFSET: str(position_ns),
        HEADER_REASON: error.reason,
        HEADER_ERROR: str(error),
        HEADER_ATTEMPT: "1",
    }
    return Message(b"", document[:DEAD_LETTER_BYTES], headers)
