"""The supervisor on real processes, and the local servers as `image-search up` runs them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from infra.errors import ConfigurationError
from infra.local_stack import ports
from infra.local_stack.program import NotReady, Program
from infra.local_stack.supervisor import ProgramFailed, Running, Supervisor, end_leftovers
from tests.conftest import Servers
from tests.stack import START_SECONDS, FullStack

SECONDS = 20

# What every program of these tests begins with.
PRELUDE = """
import os, signal, subprocess, sys, time
def mark(*children):
    with open({mark!r}, "a") as file:
        print(os.getpid(), *children, file=file)
"""
SLEEP = "time.sleep(600)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nmark()\ntime.sleep(600)"
WITH_CHILD = """
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
mark(child.pid)
time.sleep(600)
"""
TELLS_ITS_END = """
def end(*_):
    with open("order", "a") as file:
        print(sys.argv[-1], file=file)
    sys.exit()
signal.signal(signal.SIGTERM, end)
mark()
time.sleep(600)
"""


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    made = Supervisor(tmp_path, tmp_path / "processes.json")
    yield made
    await made.stop()


def script(tmp_path: Path, name: str, code: str, *, ready: Callable[[], Awaitable[None]] | None = None) -> Program:
    """A program that is ready once it wrote `<name>.ready`, with its process id and those of its children."""
    mark = tmp_path / f"{name}.ready"

    async def marked() -> None:
        if not mark.exists() or not mark.read_text().endswith("\n"):
            raise NotReady("no mark yet")

    return Program(
        name=name,
        command=(sys.executable, "-c", PRELUDE.format(mark=str(mark)) + code),
        working_dir=tmp_path,
        ready=ready or marked,
        start_seconds=SECONDS,
        stop_seconds=1.0,
    )


def pids(tmp_path: Path, name: str) -> list[int]:
    return [int(pid) for pid in (tmp_path / f"{name}.ready").read_text().split()]


async def gone(*numbers: int) -> None:
    async with asyncio.timeout(SECONDS):
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in numbers):
            await asyncio.sleep(0.02)


async def test_what_dies_is_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.start([script(tmp_path, "one", f"mark(); {SLEEP}")])
    (first,) = pids(tmp_path, "one")
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(SECONDS):
        while len(pids(tmp_path, "one")) < 2:
            await asyncio.sleep(0.02)
        await supervisor.wait_ready("one")
    running = supervisor.running("one")
    assert running.pid == pids(tmp_path, "one")[-1] != first
    assert (running.restarts, running.trouble) == (1, "ended with code -9")


async def test_stopping_ends_children_too_and_nothing_else(supervisor: Supervisor, tmp_path: Path) -> None:
    bystander = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(600)")
    await supervisor.start([script(tmp_path, "parent", WITH_CHILD)])
    numbers = pids(tmp_path, "parent")
    assert len(numbers) == 2
    await supervisor.stop()
    await gone(*numbers)
    assert bystander.returncode is None
    bystander.kill()
    await bystander.wait()


async def test_a_program_that_ignores_sigterm_is_killed_after_its_time(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.start([script(tmp_path, "deaf", DEAF)])
    began = time.monotonic()
    await supervisor.stop()
    assert 0.9 < time.monotonic() - began < 5
    await gone(*pids(tmp_path, "deaf"))


async def test_hurry_kills_without_waiting(tmp_path: Path) -> None:
    hurry = asyncio.Event()
    supervisor = Supervisor(tmp_path, tmp_path / "processes.json", hurry=hurry)
    deaf = script(tmp_path, "deaf", DEAF)
    await supervisor.start([Program(deaf.name, deaf.command, deaf.working_dir, deaf.ready, stop_seconds=600)])
    hurry.set()
    async with asyncio.timeout(5):
        await supervisor.stop()


async def test_later_programs_are_stopped_before_earlier_ones(supervisor: Supervisor, tmp_path: Path) -> None:
    for name in ("server", "service"):
        program = script(tmp_path, name, TELLS_ITS_END)
        await supervisor.start([Program(name, (*program.command, name), tmp_path, program.ready, stop_seconds=SECONDS)])
    await supervisor.stop()
    assert (tmp_path / "order").read_text().split() == ["service", "server"]


async def test_a_failed_start_shows_the_end_of_the_log(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(ProgramFailed, match=r"(?s)broken did not become ready: it ended with code 3.*no such setting"):
        await supervisor.start([script(tmp_path, "broken", "print('no such setting', flush=True); sys.exit(3)")])


async def test_a_program_that_never_answers_is_given_up_with_the_reason(supervisor: Supervisor, tmp_path: Path) -> None:
    async def never() -> None:
        raise NotReady("port 1 is closed")

    silent = script(tmp_path, "silent", SLEEP, ready=never)
    with pytest.raises(ProgramFailed, match="silent did not become ready: port 1 is closed"):
        await supervisor.start([Program(silent.name, silent.command, silent.working_dir, never, start_seconds=0.3)])
    assert supervisor.running("silent").pid is None


SUPERVISE = """
import asyncio, sys
from pathlib import Path
from infra.local_stack.program import NotReady, Program
from infra.local_stack.supervisor import Supervisor
folder, code = Path(sys.argv[1]), sys.argv[2]
async def ready():
    if not (folder / "mark").exists(): raise NotReady("no mark yet")
async def main():
    program = Program("orphan", (sys.executable, "-c", code), folder, ready)
    await Supervisor(folder, folder / "processes.json").start([program])
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def killed_supervisor(tmp_path: Path, code: str) -> int:
    """Kill a supervisor with SIGKILL, and return the process id of its program."""
    whole = PRELUDE.format(mark=str(tmp_path / "mark")) + code
    process = subprocess.Popen([sys.executable, "-c", SUPERVISE, str(tmp_path), whole], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    return int((tmp_path / "mark").read_text())


async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    await gone(killed_supervisor(tmp_path, f"mark(); {SLEEP}"))


async def test_what_did_outlive_it_is_ended_by_the_next_one(tmp_path: Path) -> None:
    survivor = killed_supervisor(tmp_path, DEAF)
    assert psutil.pid_exists(survivor)
    assert end_leftovers(tmp_path / "processes.json") == ["orphan"]
    await gone(survivor)
    assert end_leftovers(tmp_path / "processes.json") == []


def test_a_process_that_took_over_a_number_is_not_ended(tmp_path: Path) -> None:
    record = tmp_path / "processes.json"
    record.write_text(json.dumps([{"name": "gone", "pid": os.getpid(), "created": 1.0, "state": "ready", "restarts": 0}]))
    assert end_leftovers(record) == []


def test_whoever_holds_a_port_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"(?s)pid {os.getpid()}: .*holds {port} \(IMAGE_SEARCH_S3_PORT\)"):
            ports.require_free({"s3_port": port})
    ports.require_free({"s3_port": port})


# -- the servers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["seaweedfs", "kafka", "milvus"])
async def test_a_killed_server_comes_back(servers: Servers, name: str) -> None:
    before = servers.stack.running(name).pid
    assert before is not None
    servers.stack.kill(name)
    async with asyncio.timeout(60):
        await servers.stack.wait_ready(name)
    assert servers.stack.running(name).pid not in (None, before)
    await gone(before)


async def test_who_has_no_key_is_refused_everywhere(servers: Servers) -> None:
    default = {"Authorization": "Bearer root:Milvus"}
    collections = f"{servers.settings.milvus_uri}/v1/vector/collections"
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{servers.settings.s3_endpoint}/images/x.jpg", data=b"x") as answer:
            assert answer.status == 403
        async with session.delete(f"http://127.0.0.1:{servers.ports.filer_port}/buckets/") as answer:
            assert answer.status == 401
        async with session.get(collections) as answer:
            assert answer.status == 401
        async with session.get(collections, headers=default) as answer:
            assert answer.status == 401, "the password that every Milvus has must not work"


def listening(running: Running) -> set[tuple[str, int]]:
    assert running.pid is not None
    connections = psutil.Process(running.pid).net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN and c.laddr}


async def test_nothing_but_milvus_listens_beyond_this_machine(servers: Servers) -> None:
    beyond = {
        running.program.name: {ip for ip, _ in listening(running) if ip.removeprefix("::ffff:") != "127.0.0.1"}
        for running in servers.stack.programs
    }
    assert beyond == {"seaweedfs": set(), "kafka": set(), "milvus": {"::"}}


async def test_servers_take_no_port_that_is_no_setting(servers: Servers) -> None:
    known = set(servers.ports.ports().values())
    for running in servers.stack.programs:
        taken = {port for _, port in listening(running)}
        assert taken
        assert taken - known == set(), f"two stacks would collide over {running.program.name}"


async def test_servers_alone_start_without_the_services_that_would_change_an_index(tmp_path: Path) -> None:
    stack = FullStack.start(tmp_path, arguments=("--servers-only",))
    try:
        async with asyncio.timeout(START_SECONDS):
            while "The servers run" not in await asyncio.to_thread(stack.log.read_text):
                assert stack.process.poll() is None, stack.log.read_text()
                await asyncio.sleep(0.1)
        assert stack.programs().keys() == {"supervisor", "weed", "kafka", "milvus"}
    finally:
        assert stack.stop() == 0
