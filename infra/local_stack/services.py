"""The services of a stack as programs: the bridge, as many workers as are asked for, the query service."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

import aiohttp

from infra.local_stack.program import NotReady, Program
from infra.settings import ENV_PREFIX, StackSettings

STOP_SECONDS = 30.0
# Whose account each command works under.
ACCOUNTS = {"bridge": "bridge", "worker": "worker", "serve": "query"}


def worker_ports(settings: StackSettings) -> dict[str, int]:
    """Port of health and metrics of each worker, by its name: `worker`, `worker-2`, …"""
    ports = enumerate(settings.processor_ports(), start=1)
    return {"worker" if number == 1 else f"worker-{number}": port for number, port in ports}


def service_ports(settings: StackSettings) -> dict[str, int]:
    return {"bridge": settings.bridge_port, **worker_ports(settings), "serve": settings.query_port}


def programs(
    root: Path,
    settings: StackSettings,
    variables: Mapping[str, str],
    commands: Mapping[str, tuple[str, ...]],
    accounts: Mapping[str, Mapping[str, str]],
) -> list[Program]:
    """`commands`: the command lines of bridge, worker and serve. Workers differ in port and scratch folder only.

    `accounts`: variables of each service that say who it is at the stores.
    """

    def service(name: str, port: int, own: Mapping[str, str] | None = None) -> Program:
        role = name.partition("-")[0]
        return Program(
            name=name,
            command=commands[role],
            working_dir=root,
            environment={**variables, **accounts[ACCOUNTS[role]], **(own or {})},
            ready=lambda: _ready(port),
            start_seconds=settings.server_start_seconds,
            stop_seconds=STOP_SECONDS,
        )

    workers = [
        service(
            name,
            port,
            {f"{ENV_PREFIX}PROCESSOR_PORT": str(port), f"{ENV_PREFIX}PROCESSOR_DATA_DIR": str(root / name)},
        )
        for name, port in worker_ports(settings).items()
    ]
    return [service("bridge", settings.bridge_port), *workers, service("serve", settings.query_port)]


async def _ready(port: int) -> None:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz/ready") as answer:
            if answer.status != HTTPStatus.OK:
                raise NotReady(f"/healthz/ready answers {answer.status}: {(await answer.text())[:500]}")
    except aiohttp.ClientError as error:
        raise NotReady(f"/healthz/ready does not answer: {type(error).__name__}") from None
