"""Promise: an answer lost on the way is no loss and no double (invariants 3, 6): the write is repeated under its key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

from infra.settings import ProcessorSettings
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import deployed
from tests.pictures import jpeg
from tests.proxy import Proxy

PICTURES = 40


async def test_answers_of_the_vector_store_lost_and_late(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=8, milvus_timeout_seconds=3.0)
    address = urlsplit(settings.milvus_uri)
    async with Proxy.to(address.hostname or "", address.port or 0) as proxy, deployed(settings, tmp_path) as deployment:
        deployment.worker(milvus_uri=f"http://127.0.0.1:{proxy.port}")
        await deployment.send([await deployment.put("first.jpg", jpeg(1, (120, 90)))])
        await deployment.settle()

        sending = [await deployment.put(f"{number:03}.jpg", jpeg(100 + number, (120, 90))) for number in range(PICTURES)]
        proxy.lose_answers = True
        await deployment.send(sending)
        await asyncio.sleep(3)
        assert proxy.lost > 0
        assert await deployment.lag() > 0
        proxy.lose_answers = False
        proxy.delay_seconds = 0.5
        await deployment.settle()
        proxy.delay_seconds = 0.0

        rows = await deployment.rows()
        assert len(rows) == PICTURES + 1
        assert {row.state for row in rows.values()} == {RowState.INDEXED}
        report = await deployment.verified()
        assert list(report.vectors.values()) == [PICTURES + 1]
