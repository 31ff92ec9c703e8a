"""API keys on the real service: made by the command, asked for on every route, held to their place, revoked."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from aiohttp.test_utils import TestClient

from infra.settings import ProcessorSettings
from query_service.app import ENDPOINTS, init_app
from schemas.access import Open, Scope
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed, environment_of
from tests.pictures import jpeg
from tests.query_deployment import Client, query_settings
from tests.query_http import path_of
from tests.query_world import Server
from tests.stack import IMAGE_SEARCH

ABSENT = "0" * 64


async def command(deployment: Deployment, *arguments: str) -> str:
    done = await asyncio.to_thread(
        subprocess.run,
        [IMAGE_SEARCH, "keys", *arguments],
        env={**os.environ, **environment_of(deployment.settings)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def statuses(client: Client, headers: dict[str, str]) -> dict[str, int]:
    found = {}
    for endpoint in ENDPOINTS:
        async with client.request(endpoint.method, path_of(endpoint), headers=headers) as response:
            found[f"{endpoint.method} {endpoint.path}"] = response.status
    return found


async def test_keys_on_the_real_service(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    guarded = {f"{one.method} {one.path}": one.scope for one in ENDPOINTS if not isinstance(one.scope, Open)}
    async with deployed(fresh_settings(ProcessorSettings), tmp_path) as deployment:
        worker = deployment.worker()
        for key in ("mine/a.jpg", "theirs/a.jpg"):
            await deployment.send([await deployment.put(key, jpeg(1))])
        await deployment.settle()
        settings = query_settings(deployment.settings, api_keys="required")
        async with TestClient(Server(init_app(settings))) as client:
            for headers in ({}, {"X-API-Key": "isk_000000000000_" + "x" * 43}):
                assert {route for route, status in (await statuses(client, headers)).items() if status == 401} == guarded.keys()
            for scope in (Scope.SEARCH, Scope.READ):
                shown = {"X-API-Key": await command(deployment, "create", f"only {scope}", "--scope", scope)}
                answered = await statuses(client, shown)
                assert {route for route in guarded if answered[route] != 403} == {
                    route for route, needed in guarded.items() if needed == scope
                }
            place = f"{deployment.bucket}/mine/"
            narrow = await command(deployment, "create", "narrow", "--scope", "search", "--scope", "read", "--place", place)
            headers = {"Authorization": f"Bearer {narrow}"}
            async with client.post("/v1/search", data=jpeg(1), headers=headers) as response:
                assert [hit["key"] for hit in (await response.json())["hits"]] == ["mine/a.jpg"]
            async with client.get("/v1/images", headers=headers) as response:
                assert [image["key"] for image in (await response.json())["images"]] == ["mine/a.jpg"]
            async with client.get("/v1/events?cursor=earliest&follow=false", headers=headers) as response:
                events = await response.text()
                assert "mine/a.jpg" in events
                assert "theirs" not in events
            await command(deployment, "revoke", narrow.split("_")[1])
            async with asyncio.timeout(60):
                while (await statuses(client, headers))["GET /v1/images"] != 401:
                    await asyncio.sleep(0.5)
            assert narrow not in await command(deployment, "list", "--json")
        await worker.stop()
