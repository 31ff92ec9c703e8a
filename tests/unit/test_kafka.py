"""The parts of the broker's adapter and of its twin that need no server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, ClassVar

import pytest
from aiokafka import ConsumerRecord  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import (  # type: ignore[import-untyped]  # aiokafka ships no types
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
)
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidEvent, StoreUnavailable
from infra.kafka import producer as producer_module
from infra.kafka.admin import Inspector, KeptClient
from infra.kafka.connection import Connection
from infra.kafka.interface import Message, PartitionLag, Record
from infra.kafka.limits import check_size
from infra.kafka.memory import MemoryBroker, Operation
from infra.kafka.producer import KafkaProducer
from infra.kafka.reader import record_of
from schemas.topics import ALL_TOPICS, DEAD_LETTERS, OBJECTS, Topic

CONNECTION = Connection(("broker:9092",), prefix="p-", timeout_seconds=0.05)


class LibraryProducer:
    """Stands in for aiokafka's producer. `outcome` is what the next messages come to: None for sent, "silence" for nothing."""

    made: ClassVar[list[LibraryProducer]] = []
    outcome: ClassVar[KafkaError | str | None] = None

    def __init__(self, **options: Any) -> None:
        assert options["enable_idempotence"] and options["acks"] == "all" and "compression_type" not in options
        self.sent: list[tuple[str, bytes]] = []
        self.pending: list[asyncio.Future[None]] = []
        self.stopped = False
        self.client = self
        LibraryProducer.made.append(self)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await self.flush()
        self.stopped = True

    async def close(self) -> None: ...

    async def flush(self) -> None:
        if self.pending:
            await asyncio.wait(self.pending)

    async def send(self, topic: str, value: bytes, *, key: bytes, headers: list[tuple[str, bytes]]) -> Awaitable[None]:
        self.sent.append((topic, value))
        delivered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        outcome = LibraryProducer.outcome
        if outcome == "silence":
            self.pending.append(delivered)
            return asyncio.shield(delivered)
        if isinstance(outcome, KafkaError):
            delivered.set_exception(outcome)
        else:
            delivered.set_result(None)
        return delivered

    def answer(self) -> None:
        for delivered in self.pending:
            delivered.set_result(None)
        self.pending.clear()


class LibraryConsumer:
    """Stands in for aiokafka's consumer, whose end hands on that a fetch of its own was cancelled, or waits for ever."""

    def __init__(self, *, ends: bool) -> None:
        self.ends, self.connected = ends, True
        self._client = self

    async def stop(self) -> None:
        fetch = asyncio.ensure_future(asyncio.Event().wait())
        if self.ends:
            fetch.cancel()
        await fetch

    async def close(self) -> None:
        self.connected = False


class KnownTopics(Inspector):
    async def partitions(self, topic: Topic) -> list[object]:
        return [topic]


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> KafkaProducer:
    monkeypatch.setattr(producer_module, "AIOKafkaProducer", LibraryProducer)
    monkeypatch.setattr(LibraryProducer, "made", [])
    monkeypatch.setattr(LibraryProducer, "outcome", None)
    return KafkaProducer(CONNECTION, KnownTopics(CONNECTION))


async def test_after_a_time_out_nothing_is_added_until_the_rest_has_arrived(producer: KafkaProducer) -> None:
    LibraryProducer.outcome = "silence"
    with pytest.raises(StoreUnavailable):
        await producer.send(OBJECTS, [Message(b"k", b"first")])
    with pytest.raises(StoreUnavailable):
        await producer.send(OBJECTS, [Message(b"k", b"second")])
    (library,) = LibraryProducer.made
    assert library.sent == [("p-objects", b"first")]
    LibraryProducer.outcome = None
    library.answer()
    await producer.send(OBJECTS, [Message(b"k", b"third")])
    assert library.sent == [("p-objects", b"first"), ("p-objects", b"third")]
    await producer.close()
    assert library.stopped


@pytest.mark.parametrize("failure", [OutOfOrderSequenceNumber(), KafkaError("sender died"), MessageSizeTooLargeError()])
async def test_a_producer_that_failed_is_replaced(producer: KafkaProducer, failure: KafkaError) -> None:
    LibraryProducer.outcome = failure
    expected = InvalidEvent if isinstance(failure, MessageSizeTooLargeError) else StoreUnavailable
    with pytest.raises(expected):
        await producer.send(OBJECTS, [Message(b"k", b"first"), Message(b"k", b"second")])
    LibraryProducer.outcome = None
    await producer.send(OBJECTS, [Message(b"k", b"again")])
    failed, replacement = LibraryProducer.made
    assert failed.stopped
    assert replacement.sent == [("p-objects", b"again")]
    await producer.close()


async def test_the_next_producer_waits_for_what_the_failed_one_still_delivers(producer: KafkaProducer) -> None:
    LibraryProducer.outcome = "silence"
    slow = asyncio.ensure_future(producer.send(OBJECTS, [Message(b"a", b"slow")]))
    await asyncio.sleep(0)
    while not (LibraryProducer.made and LibraryProducer.made[0].sent):
        await asyncio.sleep(0)
    LibraryProducer.outcome = OutOfOrderSequenceNumber()
    with pytest.raises(StoreUnavailable):
        await producer.send(OBJECTS, [Message(b"b", b"failed")])
    LibraryProducer.outcome = None
    with pytest.raises(StoreUnavailable):
        await producer.send(OBJECTS, [Message(b"b", b"too early")])
    with pytest.raises(StoreUnavailable):
        await slow
    assert len(LibraryProducer.made) == 1
    LibraryProducer.made[0].answer()
    await producer.send(OBJECTS, [Message(b"b", b"in time")])
    assert LibraryProducer.made[1].sent == [("p-objects", b"in time")]
    await producer.close()


async def test_closing_does_not_wait_for_ever_for_a_broker_that_is_away(producer: KafkaProducer) -> None:
    LibraryProducer.outcome = "silence"
    with pytest.raises(StoreUnavailable):
        await producer.send(OBJECTS, [Message(b"k", b"first")])
    async with asyncio.timeout(5):
        await producer.close()


async def test_a_cancelled_fetch_of_the_library_does_not_end_whoever_stops_its_consumer() -> None:
    consumer = LibraryConsumer(ends=True)
    await CONNECTION.consumer_ended(consumer)
    assert not consumer.connected


async def test_whoever_is_cancelled_while_a_consumer_ends_is_cancelled() -> None:
    stopping = asyncio.create_task(Connection((), prefix="", timeout_seconds=60).consumer_ended(LibraryConsumer(ends=False)))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await CONNECTION.consumer_ended(LibraryConsumer(ends=False))  # and its time-out is no cancellation


async def test_a_client_is_kept_while_it_works_and_replaced_after_a_failure() -> None:
    started: list[int] = []
    ended: list[int] = []

    async def start() -> int:
        started.append(len(started))
        return started[-1]

    async def end(client: int) -> None:
        ended.append(client)

    kept = KeptClient(start, end)
    for _ in range(2):
        async with kept.use() as client:
            assert client == 0
    with pytest.raises(KafkaConnectionError):
        async with kept.use():
            raise KafkaConnectionError
    async with kept.use() as client:
        assert client == 1
    await kept.close()
    assert (started, ended) == ([0, 1], [0, 1])


@given(key=st.binary(max_size=50), value=st.binary(max_size=300), headers=st.dictionaries(st.text(), st.text(), max_size=3))
def test_a_message_is_refused_exactly_when_it_is_above_the_limit(key: bytes, value: bytes, headers: dict[str, str]) -> None:
    message = Message(key, value, headers)
    payload = len(key) + len(value) + sum(len(name.encode()) + len(text.encode()) for name, text in headers.items())
    check_size(Topic("roomy", 1, max_message_bytes=payload + 200), message)
    with pytest.raises(InvalidEvent):
        check_size(Topic("tight", 1, max_message_bytes=payload), message)


def test_every_message_fits_its_dead_letter() -> None:
    for topic in ALL_TOPICS:
        if topic is not DEAD_LETTERS:
            assert topic.max_message_bytes + 64 * 1024 <= DEAD_LETTERS.max_message_bytes


@pytest.mark.parametrize(
    ("begin", "committed", "end", "pending"), [(0, 0, 0, 0), (0, 3, 4, 1), (3, 1, 4, 1), (5, 2, 5, 0), (0, 9, 4, 0)]
)
def test_pending_counts_what_is_there_and_not_committed(begin: int, committed: int, end: int, pending: int) -> None:
    assert PartitionLag(0, begin, committed, end).pending == pending


async def test_a_fault_of_the_twin_comes_before_the_operation() -> None:
    broker = MemoryBroker(OBJECTS, idle_seconds=0.01)
    heard: list[Operation] = []

    async def away(operation: Operation, topic: Topic | None) -> None:
        heard.append(operation)
        raise StoreUnavailable("broker", "as told")

    producer = await broker.producer()
    async with broker.read(OBJECTS, {}) as batches:
        assert await anext(batches) == []
        broker.before_call = away
        for call in (producer.send(OBJECTS, [Message(b"k", b"v")]), broker.check(), anext(batches)):
            with pytest.raises(StoreUnavailable):
                await call
    assert heard == [Operation.SEND, Operation.CHECK, Operation.READ]
    assert broker.records(OBJECTS) == []


@given(messages=st.lists(st.tuples(st.binary(max_size=2), st.binary(max_size=3)), max_size=30), partitions=st.integers(1, 5))
async def test_the_twin_keeps_every_message_of_a_key_in_order(messages: list[tuple[bytes, bytes]], partitions: int) -> None:
    broker = MemoryBroker(OBJECTS, partitions=partitions, idle_seconds=0)
    for key, value in messages:
        await broker.send(OBJECTS, [Message(key, value)])
    found: list[Record] = []
    async with broker.read(OBJECTS, dict.fromkeys(range(partitions), 0)) as batches:
        while batch := await anext(batches):
            found += batch
    for key in {key for key, _ in messages}:
        mine = [record for record in found if record.key == key]
        assert [record.value for record in mine] == [value for other, value in messages if other == key]
        assert len({record.partition for record in mine}) == 1
    assert len(found) == len(messages)


def test_a_header_without_a_value_is_read() -> None:
    """Not ours, but a store writes to the topic of notifications, and whoever likes to any."""
    headers = (("traceparent", b"00-a"), ("none", None))
    message = ConsumerRecord("objects", 0, 1, 2, 0, b"k", b"v", None, 1, 1, headers)
    assert record_of(message).headers == {"traceparent": "00-a", "none": ""}
