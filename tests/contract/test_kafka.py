"""One suite over the broker (a real Kafka) and its twin."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete  # type: ignore[import-untyped]  # aiokafka ships no types

from infra import kafka
from infra.errors import InvalidEvent, StoreUnavailable
from infra.kafka.interface import Broker, GroupReader, Message, Record
from infra.kafka.memory import MemoryBroker
from infra.settings import CommonSettings
from schemas.events import ReasonCode
from schemas.topics import DEAD_LETTERS, OBJECTS, OUTCOMES, PROCESSOR_GROUP, Topic
from tests.conftest import FreshSettings

PARTITIONS = 3
ALL = dict.fromkeys(range(PARTITIONS), 0)
MIB = 1024 * 1024


@dataclass(frozen=True)
class Subject:
    """A broker, and what only a test does to it."""

    broker: Broker
    commit: Callable[[Topic, str, Mapping[int, int]], Awaitable[None]]
    remove_before: Callable[[Topic, int, int], Awaitable[None]]


@pytest.fixture
async def memory_subject() -> AsyncIterator[Subject]:
    broker = MemoryBroker()

    async def commit(topic: Topic, group: str, offsets: Mapping[int, int]) -> None:
        broker.commit(topic, group, offsets)

    async def remove_before(topic: Topic, partition: int, offset: int) -> None:
        broker.remove_before(topic, partition, offset)

    yield Subject(broker, commit, remove_before)


@pytest.fixture
async def kafka_subject(fresh_settings: FreshSettings) -> AsyncIterator[Subject]:
    settings = fresh_settings(CommonSettings)
    bootstrap = list(settings.kafka_bootstrap)
    prefix = settings.kafka_topic_prefix

    async def commit(topic: Topic, group: str, offsets: Mapping[int, int]) -> None:
        async with AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=prefix + group, enable_auto_commit=False) as consumer:
            partitions = {TopicPartition(topic.full_name(prefix), number): offset for number, offset in offsets.items()}
            consumer.assign(list(partitions))
            await consumer.commit(partitions)

    async def remove_before(topic: Topic, partition: int, offset: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        await admin.start()
        place = TopicPartition(topic.full_name(prefix), partition)
        await admin.delete_records({place: RecordsToDelete(before_offset=offset)})
        await admin.close()

    broker = await kafka.connect(settings)
    yield Subject(broker, commit, remove_before)
    await broker.close()


@pytest.fixture(params=["memory", "kafka"])
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(f"{request.param}_subject")
    return found


@pytest.fixture
async def broker(subject: Subject) -> Broker:
    await subject.broker.ensure_topics([OBJECTS, DEAD_LETTERS], partitions=PARTITIONS, replication=1)
    return subject.broker


async def send(broker: Broker, *messages: Message, topic: Topic = OBJECTS) -> None:
    producer = await broker.producer()
    try:
        await producer.send(topic, messages)
    finally:
        await producer.close()


async def take(broker: Broker, start: Mapping[int, int], count: int, topic: Topic = OBJECTS) -> list[Record]:
    found: list[Record] = []
    async with asyncio.timeout(20), broker.read(topic, start) as batches:
        while len(found) < count:
            found += await anext(batches)
    return found


async def one_partition(broker: Broker, count: int) -> tuple[int, list[Record]]:
    """Writes so many records with one key; returns their partition and what it holds."""
    await send(broker, *(Message(b"one key", str(number).encode()) for number in range(count)))
    records = await take(broker, ALL, count)
    return records[0].partition, records


async def test_what_is_sent_is_read_back(broker: Broker) -> None:
    message = Message(b"images/a.jpg", b'{"a": 1}', {"traceparent": "00-ab", "name": "ä"})
    before = time.time_ns() // 1_000_000
    await send(broker, message)
    (record,) = await take(broker, ALL, 1)
    assert (record.key, record.value, record.headers) == (message.key, message.value, message.headers)
    assert record.offset == 0
    assert before - 1000 <= record.time_ms <= time.time_ns() // 1_000_000 + 1000


async def test_all_of_one_key_lies_in_one_partition_in_order(broker: Broker) -> None:
    keys = [f"images/{number}.jpg".encode() for number in range(20)]
    await send(broker, *(Message(key, str(turn).encode()) for turn in range(5) for key in keys))
    records = await take(broker, ALL, 100)
    assert len(records) == 100
    for key in keys:
        mine = [record for record in records if record.key == key]
        assert len({record.partition for record in mine}) == 1
        assert [record.value for record in mine] == [b"0", b"1", b"2", b"3", b"4"]
    assert {record.partition for record in records} == set(ALL)
    for partition in ALL:
        offsets = [record.offset for record in records if record.partition == partition]
        assert offsets == list(range(len(offsets)))


async def test_an_empty_key_and_an_empty_value_are_bytes(broker: Broker) -> None:
    await send(broker, Message(b"", b""))
    (record,) = await take(broker, ALL, 1)
    assert (record.key, record.value) == (b"", b"")


async def test_nothing_to_send_is_sent(broker: Broker) -> None:
    await send(broker)
    assert await broker.offsets(OBJECTS) == dict.fromkeys(range(PARTITIONS), (0, 0))


async def test_calls_of_one_producer_may_overlap(broker: Broker) -> None:
    producer = await broker.producer()
    await asyncio.gather(*(producer.send(OBJECTS, [Message(bytes([number]), b"x")]) for number in range(50)))
    await producer.close()
    assert {record.key for record in await take(broker, ALL, 50)} == {bytes([number]) for number in range(50)}


async def test_a_reader_without_a_start_sees_only_what_comes(broker: Broker) -> None:
    await send(broker, Message(b"k", b"old"))
    async with asyncio.timeout(20), broker.read(OBJECTS, {}) as batches:
        assert await anext(batches) == []
        await send(broker, Message(b"k", b"new"))
        found: list[Record] = []
        while not found:
            found = await anext(batches)
    assert [record.value for record in found] == [b"new"]


async def test_a_reader_hears_at_once_and_returns_every_second_without_news(broker: Broker) -> None:
    async with broker.read(OBJECTS, ALL) as batches:
        started = time.monotonic()
        assert await anext(batches) == []
        assert 0.5 <= time.monotonic() - started <= 2.0
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await send(broker, Message(b"k", b"news"))
        assert [record.value for record in await waiting] == [b"news"]
        assert time.monotonic() - started <= 0.5


async def test_a_start_outside_of_what_is_there_is_moved_into_it(subject: Subject, broker: Broker) -> None:
    partition, records = await one_partition(broker, 5)
    await subject.remove_before(OBJECTS, partition, 2)
    found = await take(broker, {partition: 0}, 3)
    assert [record.offset for record in found] == [2, 3, 4]
    async with asyncio.timeout(20), broker.read(OBJECTS, {partition: 99, 1000: 5}) as batches:
        assert await anext(batches) == []
        await send(broker, Message(records[0].key, b"next"))
        news: list[Record] = []
        while not news:
            news = await anext(batches)
    assert [(record.offset, record.value) for record in news] == [(5, b"next")]


async def test_readers_do_not_disturb_each_other(broker: Broker) -> None:
    await send(broker, Message(b"a", b"1"), Message(b"b", b"2"))
    both = await asyncio.gather(take(broker, ALL, 2), take(broker, ALL, 2))
    assert sorted(both[0], key=lambda record: record.key) == sorted(both[1], key=lambda record: record.key)


async def test_a_list_of_records_is_bounded(broker: Broker) -> None:
    await send(broker, *(Message(str(number).encode(), b"x") for number in range(1200)))
    sizes: list[int] = []
    async with asyncio.timeout(20), broker.read(OBJECTS, ALL) as batches:
        while sum(sizes) < 1200:
            sizes.append(len(await anext(batches)))
    assert sum(sizes) == 1200
    assert max(sizes) <= 500


async def test_offsets_follow_writing_and_retention(subject: Subject, broker: Broker) -> None:
    assert await broker.offsets(OBJECTS) == dict.fromkeys(range(PARTITIONS), (0, 0))
    partition, _ = await one_partition(broker, 4)
    await subject.remove_before(OBJECTS, partition, 3)
    offsets = await broker.offsets(OBJECTS)
    assert offsets[partition] == (3, 4)
    assert len(offsets) == PARTITIONS


async def test_a_group_that_never_committed_has_everything_before_it(broker: Broker) -> None:
    partition, _ = await one_partition(broker, 4)
    lags = {lag.partition: lag for lag in await broker.lag(OBJECTS, PROCESSOR_GROUP)}
    assert set(lags) == set(ALL)
    assert (lags[partition].begin, lags[partition].committed, lags[partition].end) == (0, 0, 4)
    assert sum(lag.pending for lag in lags.values()) == 4


async def test_lag_is_what_a_group_has_not_committed(subject: Subject, broker: Broker) -> None:
    partition, _ = await one_partition(broker, 4)
    await subject.commit(OBJECTS, PROCESSOR_GROUP, {partition: 3})
    await subject.commit(OBJECTS, "another", {partition: 1})
    lags = {lag.partition: lag for lag in await broker.lag(OBJECTS, PROCESSOR_GROUP)}
    assert (lags[partition].committed, lags[partition].pending) == (3, 1)
    await subject.commit(OBJECTS, PROCESSOR_GROUP, {partition: 4})
    assert sum(lag.pending for lag in await broker.lag(OBJECTS, PROCESSOR_GROUP)) == 0


async def test_what_retention_removed_is_not_pending(subject: Subject, broker: Broker) -> None:
    partition, _ = await one_partition(broker, 4)
    await subject.commit(OBJECTS, PROCESSOR_GROUP, {partition: 1})
    await subject.remove_before(OBJECTS, partition, 3)
    (lag,) = [lag for lag in await broker.lag(OBJECTS, PROCESSOR_GROUP) if lag.partition == partition]
    assert lag.pending == 1


async def test_the_time_of_a_record_or_of_the_first_behind_it(subject: Subject, broker: Broker) -> None:
    partition, records = await one_partition(broker, 3)
    times = [await broker.time_of(OBJECTS, partition, offset) for offset in range(4)]
    assert times == [*(record.time_ms for record in records), None]
    await subject.remove_before(OBJECTS, partition, 2)
    assert await broker.time_of(OBJECTS, partition, 0) == records[2].time_ms
    assert await broker.time_of(OBJECTS, PARTITIONS, 0) is None
    empty = next(number for number in ALL if number != partition)
    assert await broker.time_of(OBJECTS, empty, 0) is None


async def test_times_can_be_asked_for_at_once(broker: Broker) -> None:
    await send(broker, *(Message(str(number).encode(), b"x") for number in range(30)))
    found = await asyncio.gather(*(broker.time_of(OBJECTS, partition, 0) for partition in ALL for _ in range(4)))
    assert None not in found


async def test_a_message_above_the_limit_of_its_topic_is_refused_and_sends_nothing(broker: Broker) -> None:
    with pytest.raises(InvalidEvent) as caught:
        await send(broker, Message(b"k", b"small"), Message(b"k", bytes(MIB)))
    assert caught.value.reason is ReasonCode.EVENT_INVALID
    assert sum(end for _, end in (await broker.offsets(OBJECTS)).values()) == 0


async def test_the_largest_message_of_a_topic_fits_and_so_does_its_dead_letter(broker: Broker) -> None:
    value = bytes(MIB - 256)
    await send(broker, Message(b"k", value))
    (record,) = await take(broker, ALL, 1)
    headers = {"image-search-error": "x" * 4000}
    await send(broker, Message(record.key, record.value, headers), topic=DEAD_LETTERS)
    (letter,) = await take(broker, ALL, 1, topic=DEAD_LETTERS)
    assert (letter.value, letter.headers) == (value, headers)


async def test_topics_are_made_once_and_left_as_they_are(broker: Broker) -> None:
    await send(broker, Message(b"k", b"kept"))
    await asyncio.gather(*(broker.ensure_topics([OBJECTS, OUTCOMES], partitions=7, replication=1) for _ in range(3)))
    assert len(await broker.offsets(OBJECTS)) == PARTITIONS
    assert len(await broker.offsets(OUTCOMES)) == 7
    assert [record.value for record in await take(broker, ALL, 1)] == [b"kept"]


async def test_a_missing_topic_is_a_fault_that_says_what_to_do(broker: Broker) -> None:
    async def read() -> None:
        async with broker.read(OUTCOMES, {}):
            pass

    calls = [
        send(broker, Message(b"k", b"v"), topic=OUTCOMES),
        broker.offsets(OUTCOMES),
        broker.lag(OUTCOMES, PROCESSOR_GROUP),
        broker.time_of(OUTCOMES, 0, 0),
        read(),
        broker.offsets(OUTCOMES),  # and none of these made it
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="image-search upgrade"):
            await call


# -- groups --------------------------------------------------------------------------------------------------------------
async def next_batch(reader: GroupReader) -> list[Record]:
    async with asyncio.timeout(20):
        while not (found := await reader.batch()):
            pass
    return found


async def taken(reader: GroupReader, count: int) -> list[Record]:
    found: list[Record] = []
    while len(found) < count:
        found += await next_batch(reader)
    return found


async def test_a_group_begins_at_the_oldest_and_goes_on_behind_its_commit(broker: Broker) -> None:
    await one_partition(broker, 5)
    async with broker.consume(OBJECTS, "readers") as reader:
        records = await taken(reader, 5)
        assert [record.value for record in records] == [b"0", b"1", b"2", b"3", b"4"]
        await reader.commit(records[:3])
    assert sum(lag.pending for lag in await broker.lag(OBJECTS, "readers")) == 2
    async with broker.consume(OBJECTS, "readers") as reader:
        assert [record.value for record in await taken(reader, 2)] == [b"3", b"4"]
    async with broker.consume(OBJECTS, "others") as reader:
        assert len(await taken(reader, 5)) == 5


async def test_what_was_read_and_not_committed_comes_again(broker: Broker) -> None:
    await one_partition(broker, 2)
    for _ in range(2):
        async with broker.consume(OBJECTS, "readers") as reader:
            assert len(await taken(reader, 2)) == 2


async def test_a_group_hears_at_once_and_returns_every_second_without_news(broker: Broker) -> None:
    async with broker.consume(OBJECTS, "readers") as reader:
        await send(broker, Message(b"k", b"first"))
        await taken(reader, 1)
        started = time.monotonic()
        assert await reader.batch() == []
        assert 0.5 <= time.monotonic() - started <= 2.0
        waiting = asyncio.ensure_future(reader.batch())
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await send(broker, Message(b"k", b"news"))
        assert [record.value for record in await waiting] == [b"news"]
        assert time.monotonic() - started <= 0.5


async def test_members_share_the_partitions_and_take_over_from_one_that_leaves(broker: Broker) -> None:
    keys = [str(number).encode() for number in range(30)]
    async with broker.consume(OBJECTS, "readers") as one:
        await send(broker, *(Message(key, b"1") for key in keys))
        await one.commit(await taken(one, 30))
        seen: dict[str, set[int]] = {"one": set(), "two": set()}

        async def read_on(name: str, reader: GroupReader) -> None:
            while True:
                found = await reader.batch()
                seen[name] |= {record.partition for record in found if record.value == b"2"}

        reading = [asyncio.ensure_future(read_on("one", one))]
        async with broker.consume(OBJECTS, "readers") as two:
            reading.append(asyncio.ensure_future(read_on("two", two)))
            async with asyncio.timeout(30):
                while not (seen["two"] and seen["one"]):
                    seen["one"].clear()  # from before the second joined
                    await send(broker, *(Message(key, b"2") for key in keys))
                    await asyncio.sleep(0.5)
            for task in reading:
                task.cancel()
            await asyncio.wait(reading)
        assert not seen["one"] & seen["two"]
        # Nothing of the second turn was committed: with the partitions all of it goes to the one that is left.
        again: set[int] = set()
        async with asyncio.timeout(30):
            while again != set(ALL):
                again |= {record.partition for record in await one.batch()}


async def test_a_commit_leaves_out_what_went_to_another_member(broker: Broker) -> None:
    await send(broker, *(Message(str(number).encode(), b"x") for number in range(30)))
    async with broker.consume(OBJECTS, "readers") as one:
        records = await taken(one, 30)
        async with broker.consume(OBJECTS, "readers") as two:
            found: list[Record] = []
            async with asyncio.timeout(30):
                while not found:
                    found = await two.batch()
            await one.commit(records)
            lags = {lag.partition: lag.pending for lag in await broker.lag(OBJECTS, "readers")}
            assert all(lags[record.partition] for record in found)
            await two.commit(found)


async def test_a_group_of_a_missing_topic_says_what_to_do(broker: Broker) -> None:
    with pytest.raises(StoreUnavailable, match="image-search upgrade"):
        async with broker.consume(OUTCOMES, "readers"):
            pass


async def test_a_running_broker_passes_its_check(broker: Broker) -> None:
    await broker.check()
