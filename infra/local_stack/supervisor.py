"""Runs programs as process groups: starts them side by side, restarts what dies, and ends them in order, and only them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from infra.errors import ImageSearchError, TransientError
from infra.local_stack import launch
from infra.local_stack.folder import write_private
from infra.local_stack.program import Program

PROBE_SECONDS = 5.0
PROBE_PAUSE_SECONDS = 0.1
FIRST_RESTART_SECONDS = 0.5
LONGEST_RESTART_SECONDS = 30.0
# A program that ran for this long had not failed at its start, so the next restart is quick again.
SETTLED_SECONDS = 60.0
LOG_BYTES = 50 * 1024 * 1024
LOG_CHECK_SECONDS = 60.0
TAIL_LINES = 12
LONGEST_LINE_BYTES = 1024 * 1024

State = Literal["starting", "ready", "restarting", "stopped"]


class ProgramFailed(ImageSearchError):
    """A program ended before it was ready, or was not ready in time. The message ends with its last log lines."""


@dataclass(slots=True)
class Running:
    """One program under supervision. `restarts` counts since the stack's start, `trouble` says what the last was for."""

    program: Program
    log_path: Path
    state: State = "starting"
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    trouble: str = ""
    started: float = 0.0
    created: float = 0.0
    keeper: asyncio.Task[None] | None = None
    became_ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return None if self.process is None or self.process.returncode is not None else self.process.pid

    def as_entry(self) -> dict[str, str | int | float | None]:
        return {
            "name": self.program.name,
            "pid": self.pid,
            "created": self.created,
            "state": self.state,
            "restarts": self.restarts,
        }


class Supervisor:
    """Programs write to `<logs>/<name>.log`; what runs is kept in `record`, so that another process can tell and end it."""

    def __init__(
        self,
        logs: Path,
        record: Path,
        *,
        on_change: Callable[[Running], None] = lambda running: None,
        hurry: asyncio.Event | None = None,
    ) -> None:
        """`hurry`, once set, makes a stop kill instead of wait."""
        self._logs = logs
        self._record = record
        self._on_change = on_change
        self._groups: list[list[Running]] = []
        self._trimmer: asyncio.Task[None] | None = None
        self._hurry = hurry or asyncio.Event()

    @property
    def programs(self) -> list[Running]:
        return [running for group in self._groups for running in group]

    def running(self, name: str) -> Running:
        return next(running for running in self.programs if running.program.name == name)

    async def start(self, programs: Sequence[Program]) -> None:
        """Start these side by side and return when all are ready. They are stopped before those of earlier calls.

        Raises ProgramFailed when one ends or is too slow; the others keep running until `stop`.
        """
        group = [Running(program, self._logs / f"{program.name}.log") for program in programs]
        self._groups.append(group)
        if self._trimmer is None:
            self._trimmer = asyncio.create_task(self._trim_logs())
        try:
            async with asyncio.TaskGroup() as starts:
                for running in group:
                    starts.create_task(self._start(running))
        except BaseExceptionGroup as failures:
            # The first one ended the wait for the others; theirs are its echoes.
            raise failures.exceptions[0] from None

    async def stop(self) -> None:
        """End everything, the last started group first. Each program gets SIGTERM, its stop time, then SIGKILL."""
        for group in reversed(self._groups):
            await asyncio.gather(*(self._stop(running) for running in group))
        self._groups.clear()
        if self._trimmer is not None:
            self._trimmer.cancel()
            with suppress(asyncio.CancelledError):
                await self._trimmer
            self._trimmer = None
        self._record.unlink(missing_ok=True)

    def kill(self, name: str) -> None:
        """SIGKILL to a program and all that it started; it is started again. For tests of crashes."""
        running = self.running(name)
        running.became_ready.clear()
        if running.pid is not None:
            _signal_group(running.pid, signal.SIGKILL)

    async def wait_ready(self, name: str) -> None:
        """Returns when the program is ready, also after a restart."""
        await self.running(name).became_ready.wait()

    @asynccontextmanager
    async def paused(self, name: str) -> AsyncIterator[None]:
        """Keep a program stopped for the length of the block; for tests of outages."""
        running = self.running(name)
        await self._stop(running)
        try:
            yield
        finally:
            await self._start(running)

    # -- one program -------------------------------------------------------------------------------------------------
    async def _start(self, running: Running) -> None:
        try:
            await self._spawn(running)
            await self._until_ready(running)
        except ProgramFailed:
            await self._stop(running)
            raise
        running.keeper = asyncio.create_task(self._keep(running), name=f"keep {running.program.name}")

    async def _spawn(self, running: Running) -> None:
        program = running.program
        # O_APPEND, so that the trimmer may cut the file under a program that goes on writing.
        descriptor = os.open(running.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            # A session of its own: Ctrl-C in the terminal reaches the supervisor only, which then ends all in order.
            running.process = await asyncio.create_subprocess_exec(
                *_launched(program.command, program.library_path),
                cwd=program.working_dir,
                env={**os.environ, **program.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        running.started = time.monotonic()
        running.created = _created(running.process.pid)
        self._set(running, "starting" if running.restarts == 0 else "restarting")

    async def _until_ready(self, running: Running) -> None:
        program, process = running.program, running.process
        assert process is not None
        deadline = time.monotonic() + program.start_seconds
        reason = "no answer"
        while process.returncode is None and time.monotonic() < deadline:
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await program.ready()
            except TransientError as error:
                reason = str(error)
            except TimeoutError:
                reason = f"no answer within {PROBE_SECONDS:.0f} s"
            else:
                self._set(running, "ready")
                return
            await asyncio.sleep(PROBE_PAUSE_SECONDS)
        if process.returncode is not None:
            reason = f"it ended with code {process.returncode}"
        raise ProgramFailed(
            f"{program.name} did not become ready: {reason}. End of {running.log_path}:\n{_tail(running.log_path)}"
        )

    async def _keep(self, running: Running) -> None:
        """Start it again whenever it ends, with a growing pause, until this task is cancelled."""
        pause = FIRST_RESTART_SECONDS
        while True:
            assert running.process is not None
            code = await running.process.wait()
            _signal_group(running.process.pid, signal.SIGKILL)
            if time.monotonic() - running.started > SETTLED_SECONDS:
                pause = FIRST_RESTART_SECONDS
            running.restarts += 1
            running.trouble = f"ended with code {code}"
            self._set(running, "restarting")
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_RESTART_SECONDS)
            await self._spawn(running)
            try:
                await self._until_ready(running)
            except ProgramFailed:
                _signal_group(running.process.pid, signal.SIGKILL)

    async def _stop(self, running: Running) -> None:
        if running.keeper is not None:
            running.keeper.cancel()
            with suppress(asyncio.CancelledError):
                await running.keeper
            running.keeper = None
        process = running.process
        if process is None:
            return
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            await self._ended(process, running.program.stop_seconds)
        # Also when the program itself ended well: what it started and left behind is in its group.
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        self._set(running, "stopped")

    async def _ended(self, process: asyncio.subprocess.Process, seconds: float) -> None:
        waits = {asyncio.create_task(process.wait()), asyncio.create_task(self._hurry.wait())}
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    # -- records -----------------------------------------------------------------------------------------------------
    def _set(self, running: Running, state: State) -> None:
        running.state = state
        if state == "ready":
            running.became_ready.set()
        else:
            running.became_ready.clear()
        entries = [
            {
                "name": each.program.name,
                "pid": each.pid,
                "created": each.created,
                "state": each.state,
                "restarts": each.restarts,
            }
            for each in self.programs
        ]
        write_private(self._record, json.dumps(entries, indent=1))
        self._on_change(running)

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_SECONDS)
            for running in self.programs:
                await asyncio.to_thread(_trim, running.log_path)


async def run_to_end(
    name: str,
    command: Sequence[str],
    *,
    logs: Path,
    environment: Mapping[str, str],
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Run a program to its end; each of its lines is told and kept in `<logs>/<name>.log`. Raises ProgramFailed."""
    process = await asyncio.create_subprocess_exec(
        *_launched(command, None),
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=LONGEST_LINE_BYTES,
        start_new_session=True,
    )
    assert process.stdout is not None
    log_path = logs / f"{name}.log"
    try:
        async with asyncio.timeout(seconds):
            with log_path.open("ab") as file:
                async for line in process.stdout:
                    file.write(line)
                    say(line.decode(errors="replace").rstrip())
            code = await process.wait()
    except TimeoutError:
        raise ProgramFailed(f"{name} took longer than {seconds:.0f} s; its log: {log_path}") from None
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
    if code != 0:
        raise ProgramFailed(f"{name} failed with code {code}. End of {log_path}:\n{_tail(log_path)}")


def end_leftovers(record: Path) -> list[str]:
    """End the programs of a supervisor that is gone, and return their names. Anything else, by now, under their numbers stays.

    They were told to stop when it died; this is for those that did not.
    """
    if not record.exists():
        return []
    ended = []
    for entry in json.loads(record.read_text()):
        if entry["pid"] and _created(entry["pid"]) == entry["created"]:
            _signal_group(entry["pid"], signal.SIGKILL)
            ended.append(entry["name"])
    record.unlink()
    return ended


def _launched(command: Sequence[str], library_path: Path | None) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(library_path or ""), *command)


def _created(pid: int) -> float:
    """When a process began: with its number, what tells it from a later one. 0 when it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line[:300]}" for line in lines[-TAIL_LINES:])


def _trim(path: Path) -> None:
    """Keep a log below twice LOG_BYTES. A line written between copy and cut is lost; the program is never stopped for it."""
    if path.exists() and path.stat().st_size > LOG_BYTES:
        shutil.copyfile(path, path.with_suffix(".log.1"))
        os.truncate(path, 0)
