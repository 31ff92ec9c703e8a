"""Health and metrics of a service that has no HTTP of its own (bridge, worker)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from infra.errors import ImageSearchError

CHECK_TIMEOUT_SECONDS = 5.0

Check = Callable[[], Awaitable[None]]
"""Returns when its component is well, else raises."""


async def readiness(checks: Mapping[str, Check]) -> dict[str, str]:
    """Each component with `ok`, or in a few words what is wrong. All are asked at once, each within a time-out."""

    async def ask(check: Check) -> str:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                await check()
        except TimeoutError:
            return f"no answer within {CHECK_TIMEOUT_SECONDS:g} s"
        except ImageSearchError as error:
            return type(error).__name__
        return "ok"

    answers = await asyncio.gather(*(ask(check) for check in checks.values()))
    return dict(zip(checks, answers, strict=True))


class HealthServer:
    """`/healthz/live`, `/healthz/ready` (503 with the component's name while one is not well) and `/metrics`.

    `routes` are what a service answers on the same port.
    """

    def __init__(self, host: str, port: int, checks: Mapping[str, Check], routes: Iterable[web.AbstractRouteDef] = ()) -> None:
        self._host, self._port, self._checks, self._routes = host, port, checks, tuple(routes)
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/healthz/live", self._live)
        app.router.add_get("/healthz/ready", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.add_routes(self._routes)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _live(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.Response:
        components = await readiness(self._checks)
        ready = all(answer == "ok" for answer in components.values())
        return web.json_response({"ready": ready, "components": components}, status=200 if ready else 503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
