"""The query service as a process: listens until SIGTERM or SIGINT, then lets running requests end."""

from __future__ import annotations

import asyncio
import signal
import socket

import structlog
from aiohttp import web

from infra.errors import ConfigurationError
from infra.settings import QuerySettings
from query_service.app import init_app

SHUTDOWN_SECONDS = 10.0
"""How long running requests get to end after a signal. Event streams end at once."""

KEEPALIVE_SECONDS = 75.0

log = structlog.get_logger(__name__)


async def run(settings: QuerySettings) -> None:
    """Raises ConfigurationError, also when the port is taken."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Taken before the model is loaded, so that a port in use is said at once. It refuses connections until SockSite listens.
    with _bound(settings.query_host, settings.query_port) as address:
        await _serve(settings, address, stop)


async def _serve(settings: QuerySettings, address: socket.socket, stop: asyncio.Event) -> None:
    runner = web.AppRunner(
        init_app(settings), access_log=None, keepalive_timeout=KEEPALIVE_SECONDS, shutdown_timeout=SHUTDOWN_SECONDS
    )
    try:
        await runner.setup()
        await web.SockSite(runner, address).start()
        log.info("query_service_started", address=f"http://{settings.query_host}:{settings.query_port}")
        await stop.wait()
        log.info("query_service_stops")
    finally:
        await runner.cleanup()


def _bound(host: str, port: int) -> socket.socket:
    address = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except OSError as error:
        address.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port} ({error.strerror}). "
            "End what holds the port, or set IMAGE_SEARCH_QUERY_PORT to another"
        ) from None
    return address
