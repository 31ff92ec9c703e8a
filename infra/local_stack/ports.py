"""Ports: all are checked before anything starts, and whoever holds one is named."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from contextlib import suppress

import psutil

from infra.errors import ConfigurationError
from infra.settings import ENV_PREFIX

# Below 32768, where Linux begins to hand out ports to outgoing connections: one of those could take a free port again.
FREE_PORT_RANGE = range(20000, 32000)


def require_free(ports: Mapping[str, int]) -> None:
    """Raises ConfigurationError that names each taken port, its setting and its holder. Keys are names of settings."""
    taken = {name: port for name, port in ports.items() if not is_free(port)}
    if not taken:
        return
    holders = _holders()
    by_holder: dict[str, list[str]] = {}
    for name, port in taken.items():
        holder = holders.get(port, "a process of another user")
        by_holder.setdefault(holder, []).append(f"{port} ({ENV_PREFIX}{name.upper()})")
    lines = [f"  {holder}\n    holds {', '.join(held)}" for holder, held in by_holder.items()]
    raise ConfigurationError(
        "ports are taken; stop who holds them, or set other ports by the variables named here:\n" + "\n".join(lines)
    )


def is_free(port: int) -> bool:
    # Every interface is tried, because Milvus listens on all of them. SO_REUSEADDR: a connection that was closed a minute
    # ago does not hold the port for any of our servers, and must not look as if it did.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - bound to find out, never listened on
        except OSError:
            return False
    return True


def find_free(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    found: list[int] = []
    for port in random.sample(FREE_PORT_RANGE, len(FREE_PORT_RANGE)):
        if len(found) == count:
            break
        if is_free(port):
            found.append(port)
    if len(found) < count:
        raise ConfigurationError(f"fewer than {count} free ports between {FREE_PORT_RANGE.start} and {FREE_PORT_RANGE.stop}")
    return found


def _holders() -> dict[int, str]:
    """Who listens on which port, as far as this user may see: `pid 12: program arguments`."""
    holders: dict[int, str] = {}
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None or not connection.laddr:
            continue
        with suppress(psutil.Error):
            command = " ".join(psutil.Process(connection.pid).cmdline())
            holders[connection.laddr.port] = f"pid {connection.pid}: {command[:120]}"
    return holders
