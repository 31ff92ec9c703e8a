"""Promise: the vector store may be away for longer than the broker lets a consumer be silent: nothing is acknowledged, nothing
is lost, and no hand is needed when it is back. Queries are answered 503 meanwhile.

Twice: away for 20 minutes, with the settings as they are (Faust's own interval would be 1000 s), and for longer than an
interval that is set as short as two minutes can show.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request

from infra.settings import ProcessorSettings
from query_service.app import init_app
from tests.conftest import FreshSettings, Servers
from tests.deployment import deployed
from tests.numbered import PICTURE_SIZE, Numbered
from tests.pictures import jpeg
from tests.query_deployment import query_settings
from tests.query_world import Server

pytestmark = pytest.mark.timeout(2400)

OBJECTS = 60
SHORT_INTERVAL_SECONDS = 30.0


@pytest.mark.parametrize(
    ("away_seconds", "changes"),
    [
        pytest.param(120.0, {"max_poll_interval_hours": SHORT_INTERVAL_SECONDS / 3600}, id="longer-than-the-interval"),
        pytest.param(1200.0, {}, id="20-minutes"),
    ],
)
async def test_vectors_away_for_long(
    fresh_settings: FreshSettings, servers: Servers, tmp_path: Path, away_seconds: float, changes: dict[str, object]
) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=16, milvus_timeout_seconds=3.0, **changes)
    async with deployed(settings, tmp_path) as deployment, TestClient(Server(init_app(query_settings(settings)))) as client:
        worker = deployment.worker()
        old, new = Numbered(deployment, OBJECTS), Numbered(deployment, OBJECTS, folder="new", first_seed=1000)
        await deployment.send(await old.put())
        await deployment.settle()
        assert await search(client) == 200

        async with servers.stack.paused("milvus"):
            sent = await old.change() + await new.put()
            await deployment.send(sent)
            ends = time.monotonic() + away_seconds
            while time.monotonic() < ends:
                assert await search(client) == 503
                assert await deployment.lag() == len(sent)  # nothing was acknowledged
                assert worker.process.poll() is None, deployment.last_lines()
                await asyncio.sleep(5)
        await servers.stack.wait_ready("milvus")
        await deployment.settle(300)
        assert await search(client) == 200
        assert worker.process.poll() is None
        await old.assert_as_the_bucket_says()
        await new.assert_as_the_bucket_says()
        assert await worker.stop() == 0


async def search(client: TestClient[Request, Application]) -> int:
    return (await client.post("/v1/search", data=jpeg(0, PICTURE_SIZE))).status
