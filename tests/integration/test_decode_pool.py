"""Decode processes: what one picture does must cost nobody else anything."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.errors import ConfigurationError, ImageRejected, TransientError
from processors import decode_pool
from processors.decode import Decoded, decode
from processors.decode_pool import PICTURES_A_TASK, DecodePool, _parts
from processors.raster import DecodeRules
from schemas.events import ReasonCode
from tests.integration.decode_faults import EXITS, HANGS, KILLS, render_or_misbehave
from tests.pictures import jpeg

RULES = DecodeRules(height=64, width=64, max_pixels=50_000_000, min_side=16)
TIMEOUT_SECONDS = 0.5
PICTURES = [jpeg(seed, (120, 90)) for seed in range(40)]


@pytest.fixture(scope="module")
async def pool() -> AsyncIterator[DecodePool]:
    pool = DecodePool(RULES, workers=2, timeout_seconds=TIMEOUT_SECONDS, renderer=render_or_misbehave)
    await pool.start()
    yield pool
    await pool.close()


def children(of: int | None = None) -> set[int]:
    """Live decode processes of this one: spawned by multiprocessing. It may have servers as children too."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields["PPid"]) == (of or os.getpid()) and not fields["State"].startswith("Z") and b"spawn_main" in command:
            found.add(int(fields["Pid"]))
    return found


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def assert_same(outcomes: list[Decoded | ImageRejected], pictures: list[bytes]) -> None:
    for outcome, picture in zip(outcomes, pictures, strict=True):
        assert isinstance(outcome, Decoded)
        expected = decode(picture, RULES)
        assert np.array_equal(outcome.pixels, expected.pixels)
        assert (outcome.width, outcome.height, outcome.format) == (expected.width, expected.height, expected.format)


async def test_answers_are_in_order_and_the_same_as_in_process(pool: DecodePool) -> None:
    assert_same(await pool.decode(PICTURES), PICTURES)
    assert_same(await pool.decode(PICTURES[:1]), PICTURES[:1])
    assert await pool.decode([]) == []


async def test_what_is_no_picture_is_rejected_with_its_reason(pool: DecodePool) -> None:
    outcomes = await pool.decode([PICTURES[0], b"", b"text"])
    assert isinstance(outcomes[0], Decoded)
    assert [outcome.reason for outcome in outcomes[1:] if isinstance(outcome, ImageRejected)] == [
        ReasonCode.EMPTY_OBJECT,
        ReasonCode.NOT_AN_IMAGE,
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (HANGS, ReasonCode.DECODE_TIMEOUT),
        (KILLS, ReasonCode.DECODE_CRASHED),
        (EXITS, ReasonCode.DECODE_CRASHED),
    ],
    ids=["hangs", "kills", "exits"],
)
@pytest.mark.parametrize("neighbours", [0, 1, 20])
async def test_a_killer_costs_only_itself(pool: DecodePool, bad: bytes, reason: ReasonCode, neighbours: int) -> None:
    items = [*PICTURES[:neighbours], bad, *PICTURES[20 : 20 + neighbours]]
    outcomes = await pool.decode(items)
    rejected = outcomes.pop(neighbours)
    assert isinstance(rejected, ImageRejected) and rejected.reason is reason
    assert_same(outcomes, items[:neighbours] + items[neighbours + 1 :])


async def test_two_killers_in_one_task(pool: DecodePool) -> None:
    outcomes = await pool.decode([KILLS, PICTURES[0], HANGS, PICTURES[1]])
    assert [outcome.reason if isinstance(outcome, ImageRejected) else None for outcome in outcomes] == [
        ReasonCode.DECODE_CRASHED,
        None,
        ReasonCode.DECODE_TIMEOUT,
        None,
    ]


async def test_others_go_on_while_a_picture_hangs(pool: DecodePool) -> None:
    hanging = asyncio.create_task(pool.decode([HANGS]))
    await asyncio.sleep(0)
    assert_same(await pool.decode(PICTURES[:2]), PICTURES[:2])
    assert not hanging.done()
    await hanging


async def test_processes_killed_from_outside_are_replaced(pool: DecodePool) -> None:
    await until(lambda: len(children()) == 2)
    before = children()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not before & children())
    assert_same(await pool.decode(PICTURES), PICTURES)


async def test_a_caller_that_gives_up_frees_its_process(pool: DecodePool) -> None:
    for _ in range(4):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.decode([HANGS]), 0.05)
    assert_same(await pool.decode(PICTURES), PICTURES)


async def test_a_lost_task_is_done_by_a_new_pool(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped processes stand for a task lost between pool and process: nothing ever starts it."""
    monkeypatch.setattr(decode_pool, "START_SECONDS", 3.0)
    await until(lambda: len(children()) == 2)
    stopped = children()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert_same(await pool.decode(PICTURES[:1]), PICTURES[:1])
    for pid in stopped & children():
        os.kill(pid, signal.SIGCONT)
    await until(lambda: not stopped & children())


async def test_memory_is_limited() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (7000, 7000)).save(buffer, "PNG", compress_level=1)
    pool = DecodePool(RULES, workers=1, timeout_seconds=20, memory_mib=384)
    await pool.start()
    try:
        large, small = await pool.decode([buffer.getvalue(), PICTURES[0]])
    finally:
        await pool.close()
    assert isinstance(large, ImageRejected) and large.reason is ReasonCode.TOO_MANY_PIXELS
    assert isinstance(small, Decoded)


async def test_too_little_memory_to_start_is_said_at_the_start() -> None:
    pool = DecodePool(RULES, workers=1, memory_mib=8)
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_DECODE_MEMORY_MIB"):
        await pool.start()


async def test_a_pool_that_cannot_be_kept_alive_is_a_fault_and_not_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    others = children()
    pool = DecodePool(RULES, workers=1, timeout_seconds=TIMEOUT_SECONDS)
    await pool.start()
    try:
        pool._memory_bytes = 8 * 1024 * 1024
        monkeypatch.setattr(decode_pool, "START_SECONDS", 0.2)
        pool._pool.stop()  # type: ignore[union-attr]
        with pytest.raises(TransientError):
            await pool.decode(PICTURES[:1])
    finally:
        await pool.close()
    await until(lambda: children() <= others)


async def test_close_leaves_nothing() -> None:
    processes, threads = children(), set(threading.enumerate())
    pool = DecodePool(RULES, workers=2)
    await pool.start()
    assert len(children() - processes) == 2
    decoding = asyncio.create_task(pool.decode(PICTURES))
    while not pool._tasks_waited_for:
        await asyncio.sleep(0)  # a pause of any length could outlast the decoding itself
    await pool.close()
    assert_same(await decoding, PICTURES)
    assert children() <= processes
    left = {thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio_")}
    assert not left
    await pool.close()


PARENT = """
import asyncio

async def main():
    from processors.decode_pool import DecodePool
    from processors.raster import DecodeRules
    from tests.integration.decode_faults import HANGS, render_or_misbehave
    pool = DecodePool(DecodeRules(64, 64, 1_000_000, 16), workers=2, timeout_seconds=60, renderer=render_or_misbehave)
    await pool.start()
    decoding = asyncio.create_task(pool.decode([HANGS, HANGS]))
    await asyncio.sleep(0.5)
    print("started", flush=True)
    await decoding

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_decode_processes_die_with_a_killed_parent_and_stay_small(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = await asyncio.create_subprocess_exec(sys.executable, str(program), stdout=asyncio.subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    assert (await parent.stdout.readline()).startswith(b"started")
    decoders = children(parent.pid)
    assert len(decoders) == 2
    for library in ("numpy", "openblas", "pydantic_core", "libtorch"):
        assert not any(library in mapped_files(pid) for pid in decoders)
    parent.kill()
    await parent.wait()
    await until(lambda: not any(alive(pid) for pid in decoders))


def mapped_files(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(("items", "workers", "sizes"), [(1, 2, [1]), (3, 2, [1, 2]), (32, 2, [16, 16]), (33, 2, [8, 8, 8, 9])])
def test_parts_are_even_and_few(items: int, workers: int, sizes: list[int]) -> None:
    parts = _parts([b"%d" % number for number in range(items)], workers)
    assert [len(part) for part in parts] == sizes and max(sizes) <= PICTURES_A_TASK
    assert [item for part in parts for item in part] == [b"%d" % number for number in range(items)]
