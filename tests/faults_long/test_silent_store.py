"""Promise: an object store that takes requests and does not answer costs time and nothing else (invariant 6).

A proxy swallows what the store says and keeps the connections open. Whole answers: the store counts as down and is waited for.
Bodies only, so that the store looks well: the objects are put aside after a bounded time, and the next scan tries them again.
Each read has its time-out, and its connection is given back: there are fewer of them than objects that are read at once.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest

from infra.settings import ProcessorSettings
from schemas.events import ReasonCode
from schemas.tables import RowState
from schemas.topics import HEADER_REASON
from tests.bridge import scan
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed, until
from tests.numbered import PICTURE_SIZE, Numbered
from tests.pictures import jpeg
from tests.proxy import Proxy

pytestmark = pytest.mark.timeout(1200)

OBJECTS = 60
SILENT_SECONDS = 300.0
GIVE_UP_SECONDS = 20.0
TIMEOUT_SECONDS = 2.0
CONNECTIONS = 4


@pytest.mark.parametrize("swallow", ["answers", "bodies"])
async def test_a_store_that_is_silent(
    fresh_settings: FreshSettings, tmp_path: Path, swallow: Literal["answers", "bodies"]
) -> None:
    settings = fresh_settings(
        ProcessorSettings,
        decode_workers=1,
        batch_size=16,
        s3_connections=CONNECTIONS,
        s3_timeout_seconds=TIMEOUT_SECONDS,
        read_give_up_seconds=GIVE_UP_SECONDS,
    )
    store = urlsplit(settings.s3_endpoint)
    async with Proxy.to(store.hostname or "", store.port or 0) as proxy, deployed(settings, tmp_path) as deployment:
        worker = deployment.worker(s3_endpoint=f"http://127.0.0.1:{proxy.port}")
        old, new = Numbered(deployment, OBJECTS), Numbered(deployment, OBJECTS, folder="new", first_seed=1000)
        await deployment.send(await old.put())
        await deployment.settle()

        proxy.swallow = swallow
        sent = await old.change() + await new.put()
        await deployment.send(sent)
        silent_until = time.monotonic() + SILENT_SECONDS
        if swallow == "answers":
            while time.monotonic() < silent_until:
                assert await deployment.lag() == len(sent)  # nothing was acknowledged, however long ago it was given up
                await asyncio.sleep(5)
        else:
            await deployment.settle(SILENT_SECONDS)
            reasons = {letter.headers[HEADER_REASON] for letter in await deployment.dead_letters()}
            assert reasons == {ReasonCode.OBJECT_UNREADABLE}
        assert proxy.swallowed > CONNECTIONS
        assert worker.process.poll() is None
        rows = await deployment.rows()
        assert all(rows[key].state is RowState.INDEXED for key in old.overwritten)  # nothing was taken out of the index

        proxy.swallow = None
        await deployment.send([await deployment.put("news.jpg", jpeg(9999, PICTURE_SIZE))])
        await until(lambda: _is_indexed(deployment, "news.jpg"))
        await deployment.settle()
        if swallow == "bodies":
            await scan(deployment)
        await old.assert_as_the_bucket_says()
        await new.assert_as_the_bucket_says()
        assert await worker.stop() == 0


async def _is_indexed(deployment: Deployment, name: str) -> bool:
    row = await deployment.row(name)
    return row is not None and row.state is RowState.INDEXED
