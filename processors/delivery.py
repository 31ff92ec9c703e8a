"""Between Faust's stream and the pipeline: a bounded queue, batches of what waits, acknowledgements in offset order.

Faust commits past a gap of a single unacknowledged offset, so acknowledgements must come in the order of offsets: a batch is
acknowledged only after every batch before it, and all of a batch or nothing of it.

A rebalance takes all partitions away and gives some back, each read again from what was committed. So what is in hand then is
delivered again, here or elsewhere: it is dropped, and never acknowledged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from mode import Service

from infra.metrics import EVENTS_IN_HAND, EVENTS_QUEUED
from processors.work import Delivery, IsOurs, PartitionsRevoked

log = structlog.get_logger(__name__)

SHUTDOWN_SECONDS = 20.0


class Message(Protocol):
    """The part of faust.types.Message that is used."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> float: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]] | None: ...


class StreamEvent(Protocol):
    """The part of faust.types.EventT that is used: fed by hand in unit tests."""

    @property
    def message(self) -> Message: ...

    def ack(self) -> bool: ...


def delivery_of(event: StreamEvent) -> Delivery:
    message = event.message
    return Delivery(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        time_ms=round(1000 * message.timestamp),
        key=message.key or b"",
        value=message.value or b"",
        headers={name: (value or b"").decode("utf-8", "replace") for name, value in message.headers or ()},
    )


@dataclass(frozen=True, slots=True)
class _Queued:
    """An event and the rebalance since which its partition was ours."""

    event: StreamEvent
    assignment: int


@dataclass(slots=True, eq=False)
class _Batch:
    assignment: int
    events: list[StreamEvent]
    deliveries: list[Delivery]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Batcher(Service):
    """Feeds the pipeline. A service with a task, because an exception in an `@app.task` would never end the process."""

    def __init__(
        self,
        process: Callable[[Sequence[Delivery], IsOurs], Awaitable[None]],
        *,
        batch_size: int,
        batches_in_flight: int,
        queue_events: int,
        after_ack: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__()
        self._process, self._batch_size, self._limit = process, batch_size, batches_in_flight
        self._queue: asyncio.Queue[_Queued] = asyncio.Queue(queue_events)
        self._held: _Queued | None = None
        self._assignment = 0
        self._in_flight: list[_Batch] = []
        self._after_ack = after_ack
        self._workers: set[asyncio.Task[None]] = set()

    @property
    def in_hand(self) -> int:
        """Events taken from the stream and not yet acknowledged."""
        return self.queued + sum(len(batch.events) for batch in self._in_flight)

    @property
    def queued(self) -> int:
        """Events taken from the stream and in no batch yet."""
        return self._queue.qsize() + (self._held is not None)

    async def on_start(self) -> None:
        # Asked for when somebody looks: a batch that is stuck must not hide that the queue fills behind it.
        EVENTS_IN_HAND.set_function(lambda: self.in_hand)
        EVENTS_QUEUED.set_function(lambda: self.queued)

    async def put(self, event: StreamEvent) -> None:
        """Waits while the queue is full: that is what keeps the consumer from running ahead."""
        await self._queue.put(_Queued(event, self._assignment))

    def drop(self) -> None:
        """The partitions are taken away: forget what waits, and let batches that wrote nothing yet end at their next step."""
        self._assignment += 1
        if self.in_hand:
            log.info("partitions were taken away", events=self.in_hand)

    @Service.task
    async def _feed(self) -> None:
        while not self._stopping():
            first = self._held or await self._queue.get()
            self._held = first
            # Room first, batch second: while it waits for room the batch grows, and nothing waits for a timer.
            await self._room(first.event)
            if self._stopping():
                return
            self._held = None
            if not self._is_ours(first.assignment):
                continue
            batch = self._form(first.event)
            previous = self._in_flight[-1] if self._in_flight else None
            self._in_flight.append(batch)
            worker = asyncio.create_task(self._work(batch, previous))
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    def _stopping(self) -> bool:
        return self.should_stop

    async def _room(self, first: StreamEvent) -> None:
        """Wait until another batch may start and no batch in flight holds this object: one object, one batch at a time."""
        while blocking := self._blocking(first):
            await blocking.done.wait()

    def _blocking(self, event: StreamEvent) -> _Batch | None:
        if len(self._in_flight) >= self._limit:
            return self._in_flight[0]
        return next((batch for batch in self._in_flight if self._holds(batch, event)), None)

    @staticmethod
    def _holds(batch: _Batch, event: StreamEvent) -> bool:
        key = event.message.key or b""
        return any(delivery.key == key for delivery in batch.deliveries)

    def _is_ours(self, assignment: int) -> bool:
        return assignment == self._assignment

    def _form(self, first: StreamEvent) -> _Batch:
        events = [first]
        in_flight = {delivery.key for batch in self._in_flight for delivery in batch.deliveries}
        while len(events) < self._batch_size and not self._queue.empty():
            queued = self._queue.get_nowait()
            if not self._is_ours(queued.assignment):
                continue
            if (queued.event.message.key or b"") in in_flight:
                self._held = queued  # it opens the next batch, so that offsets stay in order
                break
            events.append(queued.event)
        return _Batch(self._assignment, events, [delivery_of(event) for event in events])

    async def _work(self, batch: _Batch, previous: _Batch | None) -> None:
        try:
            await self._process(batch.deliveries, lambda: self._is_ours(batch.assignment))
            if previous is not None:
                await previous.done.wait()
            await self._acknowledge(batch)
        except PartitionsRevoked:
            log.info("batch dropped: its partitions were taken away", events=len(batch.events))
        except Exception as error:
            # `done` stays unset: a later batch must not be acknowledged over this one.
            await self.crash(error)
            raise
        self._in_flight.remove(batch)
        batch.done.set()

    async def _acknowledge(self, batch: _Batch) -> None:
        if not self._is_ours(batch.assignment):
            return
        for event in batch.events:
            event.ack()
        if self._after_ack is not None:
            await self._after_ack()

    async def on_stop(self) -> None:
        """Finish and acknowledge what is in flight; leave the queue to whoever gets the partitions next."""
        if self._workers and not self.crashed:
            _, late = await asyncio.wait(set(self._workers), timeout=SHUTDOWN_SECONDS)
            for worker in late:
                worker.cancel()
            if late:
                log.warning("stopped with unfinished batches: they are delivered again", batches=len(late))
