"""The follower over a scripted log: what it writes, where its cursor stands, and what it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from infra.errors import StoreUnavailable
from infra.kafka.memory import MemoryBroker, Operation
from infra.metadata_store.interface import Cursor
from infra.metadata_store.memory import MemoryMetadataStore
from ingest_bridge.follower import QUIET_SECONDS, Follower
from ingest_bridge.meta_tail import DocumentSplitter, TailEnded
from schemas.events import ObjectEvent
from schemas.tables import log_cursor_name
from schemas.topics import ALL_TOPICS, DEAD_LETTERS, HEADER_OFFSET, HEADER_PARTITION, HEADER_REASON, OBJECTS, Topic

SECOND = 1_000_000_000
START = 1_800_000_000 * SECOND
OVERLAP_SECONDS = 5
PACKED = Path(__file__).parent.parent / "data" / "seaweedfs" / "packed_while_catching_up.txt"

Step = Sequence[bytes] | None | TailEnded | Callable[[], None]


def put(key: str, at_ns: int, bucket: str = "images") -> bytes:
    entry = {"name": key, "attributes": {"mtime": str(at_ns // SECOND), "fileSize": "1"}}
    notification = {"newEntry": entry, "newParentPath": f"/buckets/{bucket}"}
    return json.dumps({"directory": f"/buckets/{bucket}", "eventNotification": notification, "tsNs": str(at_ns)}).encode()


class ScriptedTail:
    """Gives what the script says, then nothing more for ever."""

    def __init__(self, world: World, script: Sequence[Step]) -> None:
        self._world = world
        self._script = list(script)
        self.closed = False

    async def read(self, wait_seconds: float) -> list[bytes] | None:
        while self._script:
            step = self._script.pop(0)
            if isinstance(step, TailEnded):
                raise step
            if step is None:
                self._world.now_ns += round(wait_seconds * SECOND)
                return None
            if not callable(step):
                return list(step)
            step()
        self._world.at_the_end.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        self.closed = True


class World:
    """A log of several runs, a clock that stands still, and the twins."""

    def __init__(self, *runs: Sequence[Step]) -> None:
        self.runs = list(runs)
        self.now_ns = START
        self.broker = MemoryBroker(*ALL_TOPICS)
        self.metadata = MemoryMetadataStore()
        self.since: list[int] = []
        self.tails: list[ScriptedTail] = []
        self.gaps = 0
        self.waits: list[float] = []
        self.at_the_end = asyncio.Event()

    async def start_tail(self, since_ns: int) -> ScriptedTail:
        self.since.append(since_ns)
        tail = ScriptedTail(self, self.runs.pop(0))
        self.tails.append(tail)
        return tail

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def note_gap(self) -> None:
        self.gaps += 1

    async def follower(self, *buckets: str) -> Follower:
        return Follower(
            deployment="local",
            buckets=buckets or ("images",),
            overlap_seconds=OVERLAP_SECONDS,
            start_tail=self.start_tail,
            producer=await self.broker.producer(),
            metadata=self.metadata,
            on_gap=self.note_gap,
            now_ns=lambda: self.now_ns,
            sleep=self.sleep,
        )

    @asynccontextmanager
    async def followed(self, *buckets: str) -> AsyncIterator[Follower]:
        """The follower once it has read everything; stopped in order behind the block."""
        follower = await self.follower(*buckets)
        running = asyncio.create_task(follower.run())
        ended = asyncio.create_task(self.at_the_end.wait())
        try:
            async with asyncio.timeout(10):
                await asyncio.wait([running, ended], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running
            yield follower
        finally:
            for task in (running, ended):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    def events(self) -> list[ObjectEvent]:
        return [ObjectEvent.model_validate_json(record.value) for record in self.broker.records(OBJECTS)]

    def keys(self) -> set[str]:
        return {event.data.key for event in self.events()}

    async def cursor(self, bucket: str = "images") -> Cursor | None:
        return await self.metadata.cursor(log_cursor_name(bucket))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.retry.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("infra.retry.LONGEST_WAIT_SECONDS", 0.0)


async def test_what_the_log_says_is_written_and_the_cursor_moves() -> None:
    world = World([[put("a", START + 1)], [put("b", START + 2), put("c", START + 3)]])
    async with world.followed() as follower:
        assert world.keys() == {"a", "b", "c"}
        assert follower.handed_over_until_ns == START + 3
    assert await world.cursor() == Cursor(START + 3, clean=True)
    assert world.tails[0].closed


async def test_one_send_takes_all_that_was_read() -> None:
    sends = 0

    async def count(operation: Operation, topic: Topic | None) -> None:
        nonlocal sends
        sends += operation is Operation.SEND

    world = World([[put(str(number), START + number) for number in range(1, 101)]])
    world.broker.before_call = count
    async with world.followed():
        assert len(world.keys()) == 100
    assert sends == 1


async def test_a_first_start_begins_now_and_a_later_one_where_the_cursor_stands() -> None:
    world = World([], [])
    async with world.followed():
        assert world.since == [START - OVERLAP_SECONDS * SECOND]
    await world.metadata.save_cursor(log_cursor_name("images"), Cursor(START - 3600 * SECOND, clean=True))
    async with world.followed():
        assert world.since[1] == START - 3605 * SECOND


async def test_several_buckets_begin_at_the_oldest_cursor_and_all_move() -> None:
    world = World([[put("x", START + 1, "two")]])
    await world.metadata.save_cursor(log_cursor_name("one"), Cursor(START - 10 * SECOND, clean=True))
    await world.metadata.save_cursor(log_cursor_name("two"), Cursor(START - 20 * SECOND, clean=True))
    async with world.followed("one", "two"):
        assert world.since == [START - 25 * SECOND]
    assert await world.cursor("one") == await world.cursor("two") == Cursor(START + 1, clean=True)


async def test_the_cursor_is_unclean_while_running() -> None:
    world = World([])
    async with world.followed():
        assert await world.cursor() == Cursor(START, clean=False)
    assert await world.cursor() == Cursor(START, clean=True)


async def test_the_cursor_waits_for_the_broker() -> None:
    """Killed at any time before the acknowledgement, the next run reads the event again."""
    seen: list[Cursor | None] = []
    world = World([lambda: advance(world, 2), [put("a", START + 2 * SECOND)], lambda: advance(world, 2), None])

    async def fail_three_times(operation: Operation, topic: Topic | None) -> None:
        if operation is Operation.SEND:
            advance(world, 2)
            seen.append(await world.cursor())
            if len(seen) <= 3:
                raise StoreUnavailable("broker", "away")

    world.broker.before_call = fail_three_times
    async with world.followed() as follower:
        assert [event.data.key for event in world.events()] == ["a"]
        assert follower.handed_over_until_ns == START + 2 * SECOND
        assert await world.cursor() == Cursor(START + 2 * SECOND, clean=False)
    assert seen == [Cursor(START, clean=False)] * 4


def advance(world: World, seconds: int) -> None:
    world.now_ns += seconds * SECOND


async def test_stopped_while_the_broker_is_away_it_leaves_the_event_to_the_next_run() -> None:
    world = World([[put("a", START + 1)]], [[put("a", START + 1)]])

    async def away(operation: Operation, topic: Topic | None) -> None:
        if operation is Operation.SEND:
            world.at_the_end.set()
            await asyncio.Event().wait()

    world.broker.before_call = away
    async with world.followed():
        pass
    assert await world.cursor() == Cursor(START, clean=True)

    async def back(operation: Operation, topic: Topic | None) -> None:
        return None

    world.broker.before_call = back
    world.at_the_end.clear()
    async with world.followed():
        assert world.keys() == {"a"}


async def test_a_log_that_ended_is_taken_up_again_and_a_scan_is_asked_for() -> None:
    world = World([[put("a", START + 1)], TailEnded("EOF")], [lambda: order.append(world.gaps), [put("b", START + 2)]])
    order: list[int] = []
    async with world.followed():
        assert world.keys() == {"a", "b"}
        assert world.since[1] == START + 1 - OVERLAP_SECONDS * SECOND
        assert world.gaps == 1
    # Asked for only once the log is there again: earlier the store would not have answered the scan either.
    assert order == [0]
    assert all(tail.closed for tail in world.tails)


async def test_a_first_start_asks_for_no_scan_by_itself() -> None:
    world = World([None, [put("a", START + 1)]])
    async with world.followed():
        assert world.gaps == 0


async def test_a_filer_that_is_away_is_tried_ever_more_slowly() -> None:
    away = [TailEnded("connection refused")]
    world = World(*[away] * 8, [None])
    async with world.followed() as follower:
        assert world.gaps == 1
        await follower.check()
    assert all(first < second for first, second in zip(world.waits[:4], world.waits[1:5], strict=True))
    assert max(world.waits) <= 5.0


async def test_it_is_not_well_before_the_log_answered() -> None:
    world = World([TailEnded("connection refused")], [])
    async with world.followed() as follower:
        with pytest.raises(StoreUnavailable):
            await follower.check()


async def test_what_cannot_be_understood_is_put_aside_and_followed_by_a_scan() -> None:
    world = World([[put("a", START + 1), b'{"tsNs": 5', put("b", START + 2)]])
    async with world.followed():
        assert world.keys() == {"a", "b"}
        assert world.gaps == 1
    [letter] = world.broker.records(DEAD_LETTERS)
    assert letter.value == b'{"tsNs": 5'
    assert letter.key == b""
    assert letter.headers[HEADER_REASON] == "EVENT_NOT_JSON"
    assert int(letter.headers[HEADER_PARTITION]) == 0
    assert int(letter.headers[HEADER_OFFSET]) == START + 1


async def test_dead_letters_of_one_reading_have_names_of_their_own() -> None:
    world = World([[b"{", b"["]])
    async with world.followed():
        assert len({letter.headers[HEADER_OFFSET] for letter in world.broker.records(DEAD_LETTERS)}) == 2


async def test_a_huge_document_fits_into_a_dead_letter() -> None:
    world = World([[b"{" + b"x" * 5_000_000]])
    async with world.followed():
        assert len(world.broker.records(DEAD_LETTERS)) == 1


async def test_packed_entries_are_written_once() -> None:
    documents = DocumentSplitter().feed(PACKED.read_bytes())
    world = World([documents[:1], documents[1:]])
    async with world.followed():
        assert len(world.events()) == len(world.keys()) == 4


async def test_an_idle_log_counts_as_handed_over_up_to_a_second_ago() -> None:
    world = World([[put("a", START)], None, None])
    async with world.followed() as follower:
        assert follower.handed_over_until_ns == world.now_ns - QUIET_SECONDS * SECOND == START + SECOND


async def test_a_pause_while_catching_up_does_not_count_as_idle() -> None:
    world = World([[put("a", START - 3600 * SECOND)], None, None])
    await world.metadata.save_cursor(log_cursor_name("images"), Cursor(START - 7200 * SECOND, clean=True))
    async with world.followed() as follower:
        assert follower.handed_over_until_ns == START - 3600 * SECOND
    world.runs.append([[put("b", START - 1800 * SECOND)], None, None, None])
    world.at_the_end.clear()
    async with world.followed() as follower:
        assert follower.handed_over_until_ns == world.now_ns - QUIET_SECONDS * SECOND


async def test_half_a_document_is_no_silence() -> None:
    world = World([[put("a", START)], None, []] + [[], None] * 3)
    async with world.followed() as follower:
        assert follower.handed_over_until_ns == world.now_ns - QUIET_SECONDS * SECOND
    world = World([[put("a", START - 3600 * SECOND)]] + [None, None, []] * 3)
    await world.metadata.save_cursor(log_cursor_name("images"), Cursor(START - 7200 * SECOND, clean=True))
    async with world.followed() as follower:
        assert follower.handed_over_until_ns == START - 3600 * SECOND


async def test_the_position_never_goes_back() -> None:
    world = World([[put("new", START + 10 * SECOND)], [put("old", START - 4 * SECOND)]])
    async with world.followed() as follower:
        assert follower.handed_over_until_ns == START + 10 * SECOND
        assert world.keys() == {"new", "old"}


async def test_a_database_that_is_away_does_not_hold_up_events(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(name: str, cursor: Cursor) -> None:
        raise StoreUnavailable("database", "away")

    def break_saving() -> None:
        monkeypatch.setattr(world.metadata, "save_cursor", away)

    world = World([break_saving, lambda: advance(world, 5), [put("a", START + 1)], [put("b", START + 2)]])
    async with world.followed():
        assert world.keys() == {"a", "b"}
    assert await world.cursor() == Cursor(START, clean=False)
