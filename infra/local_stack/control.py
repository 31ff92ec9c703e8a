"""`image-search down` and `status`: what is done to a stack from another process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from infra.errors import ConfigurationError
from infra.local_stack.folder import StackFolder, read_stack_file
from infra.local_stack.services import service_ports
from infra.local_stack.supervisor import ProgramFailed, end_leftovers
from infra.settings import ClientSettings, StackSettings, load

STOP_SECONDS = 60.0
KILL_SECONDS = 15.0
ANSWER_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """`health` is `ready`, or in a few words why not."""

    name: str
    pid: int | None
    health: str
    restarts: int
    resident_mib: int


@dataclass(frozen=True, slots=True)
class StackStatus:
    profile: str
    supervisor_pid: int | None
    processes: list[ProcessStatus]
    query_url: str
    service: dict[str, Any] | None
    """What the query service answers to /v1/status; None when it does not."""

    @property
    def well(self) -> bool:
        return bool(self.processes) and self.service is not None and all(each.health == "ready" for each in self.processes)

    def as_json(self) -> dict[str, Any]:
        return {"well": self.well, **asdict(self)}


def end(folder: StackFolder) -> str:
    """End the stack of this folder, and say what was done. Raises ProgramFailed when it does not end."""
    pid = folder.holder_pid()
    if pid is None:
        leftovers = end_leftovers(folder.processes_file)
        return f"ended what a killed stack had left: {', '.join(leftovers)}" if leftovers else "no stack runs here"
    for seconds in (STOP_SECONDS, KILL_SECONDS):
        with suppress(ProcessLookupError):
            # Told twice, it kills its programs instead of waiting for them.
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if folder.holder_pid() != pid:
                return "the stack has ended"
            time.sleep(0.1)
    raise ProgramFailed(f"process {pid} does not end the stack; see {folder.logs}")


def wipe(folder: StackFolder) -> list[str]:
    """Remove the profile's data; returns a line for each thing removed. Raises ConfigurationError while a stack uses it."""
    if folder.holder_pid() is not None:
        raise ConfigurationError(f"{folder.root} is in use by {folder.holder()}")
    if not folder.root.exists():
        return [f"there is no data in {folder.root}"]
    lines = [f"removed {path} ({_mib(path)} MiB)" for path in sorted(folder.root.iterdir())]
    shutil.rmtree(folder.root)
    if read_stack_file(folder).get("PROFILE") == folder.profile:
        folder.stack_file.unlink()
        lines.append(f"removed {folder.stack_file}")
    return lines


async def status(folder: StackFolder) -> StackStatus:
    """Look at the processes and ask the services. Raises ConfigurationError for settings that are not valid."""
    settings = load(StackSettings, state_dir=folder.state_dir)
    pid = folder.holder_pid()
    entries = json.loads(folder.processes_file.read_text()) if pid is not None and folder.processes_file.exists() else []
    ports = service_ports(settings)
    query_url = f"http://127.0.0.1:{settings.query_port}"
    key = load(ClientSettings, state_dir=folder.state_dir).api_key.get_secret_value()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session:
        processes, service = await asyncio.gather(
            asyncio.gather(*(_process_status(session, entry, ports.get(entry["name"])) for entry in entries)),
            _service_status(session, query_url) if pid is not None else _nothing(),
        )
    return StackStatus(folder.profile, pid, list(processes), query_url, service)


async def _process_status(session: aiohttp.ClientSession, entry: dict[str, Any], port: int | None) -> ProcessStatus:
    health = str(entry["state"])
    resident = 0
    try:
        process = psutil.Process(entry["pid"] or -1)
        members = [process, *process.children(recursive=True)]
        resident = sum(member.memory_info().rss for member in members) // 2**20
    except (psutil.Error, ValueError):
        health = "not running"
    if health == "ready" and port is not None:
        health = await _health(session, port)
    return ProcessStatus(entry["name"], entry["pid"], health, entry["restarts"], resident)


async def _health(session: aiohttp.ClientSession, port: int) -> str:
    try:
        async with session.get(f"http://127.0.0.1:{port}/healthz/ready") as answer:
            if answer.status == HTTPStatus.OK:
                return "ready"
            components = (await answer.json()).get("components", {})
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return f"does not answer ({type(error).__name__})"
    return "not ready: " + ", ".join(f"{name}: {state}" for name, state in components.items() if state != "ok")


async def _service_status(session: aiohttp.ClientSession, query_url: str) -> dict[str, Any] | None:
    try:
        async with session.get(f"{query_url}/v1/status", raise_for_status=True) as answer:
            body: dict[str, Any] = await answer.json()
            return body
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


async def _nothing() -> None:
    return None


def print_status(report: StackStatus) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if report.supervisor_pid is None:
        console.print(f"no stack of profile {report.profile} runs here; start one with: image-search up")
        return
    table = Table("process", "pid", "health", "restarts", "resident", title=f"profile {report.profile}", title_justify="left")
    for each in report.processes:
        colour = "green" if each.health == "ready" else "red"
        pid = "" if each.pid is None else str(each.pid)
        table.add_row(each.name, pid, f"[{colour}]{each.health}[/]", str(each.restarts), f"{each.resident_mib} MiB")
    console.print(table)
    if report.service is None:
        console.print(f"[red]the query service at {report.query_url} does not say its status[/]")
        return
    images = ", ".join(f"{number} {state}" for state, number in report.service["images"].items())
    lag = ", ".join(f"{topic} {each['pending']}" for topic, each in report.service["lag"].items())
    model, freshness = report.service["model"], report.service["freshness"]
    console.print(f"pictures   {images or 'none yet'}")
    console.print(f"waiting    {lag or 'nothing'}")
    console.print(f"model      {model['name']} ({model['precision']}, {model['backend']}), collection {model['collection']}")
    console.print(f"findable   up to {freshness['indexed_through'] or freshness['reason']}")
    console.print(f"page       {report.query_url}/")


def _mib(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file() and not each.is_symlink()]
    return sum(each.stat().st_size for each in files) // 2**20
