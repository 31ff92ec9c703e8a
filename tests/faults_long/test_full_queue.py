"""Promise: MinIO's queue for events may run full while the broker is away: MinIO says so, and a scan finds what it dropped.

A MinIO of its own with room for a few events. Its notifications alone are relayed until the scan is asked for.
"""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.local_stack.minio import STORED
from infra.settings import ProcessorSettings
from tests.bridge import relaying, scan
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed, until
from tests.numbered import Numbered
from tests.own_minio import OwnMinio, own_minio

pytestmark = pytest.mark.timeout(900)

OBJECTS = 60
QUEUE_LIMIT = 20
ERRORS = "minio_notification_events_errors_total"
"""How an operator sees it; docs/notifications.md names it."""


async def test_queue_of_events_full(fresh_settings: FreshSettings, servers: Servers, tmp_path: Path) -> None:
    environment = {f"MINIO_NOTIFY_KAFKA_QUEUE_LIMIT_{STORED}": str(QUEUE_LIMIT), "MINIO_PROMETHEUS_AUTH_TYPE": "public"}
    async with own_minio(servers, tmp_path / "minio", **environment) as minio:
        settings = fresh_settings(ProcessorSettings, **minio.values, decode_workers=1)
        async with deployed(settings, tmp_path) as deployment, relaying(settings):
            deployment.worker()
            old, new = Numbered(deployment, OBJECTS), Numbered(deployment, OBJECTS, folder="new", first_seed=1000)
            await old.put()
            await until(lambda: _are_rows(deployment, OBJECTS))
            await until(lambda: _has_told_all(minio))
            before = await _errors(settings)

            async with servers.stack.paused("kafka"):
                sent = await new.put() + await old.change()
                assert minio.stored_events() == QUEUE_LIMIT
                # The direct target takes none of them, and the stored one those for which it has room.
                failed = len(sent) + len(sent) - QUEUE_LIMIT
                await until(lambda: _errors_are(settings, before + failed))
            await servers.stack.wait_ready("kafka")

            await until(lambda: _are_rows(deployment, OBJECTS + QUEUE_LIMIT))
            await until(lambda: _has_told_all(minio))
            await deployment.settle()
            assert len(await deployment.rows()) == OBJECTS + QUEUE_LIMIT  # the others are missing, and stay so
            await scan(deployment)
            await old.assert_as_the_bucket_says()
            await new.assert_as_the_bucket_says()


async def _are_rows(deployment: Deployment, number: int) -> bool:
    return len(await deployment.rows()) == number


async def _has_told_all(minio: OwnMinio) -> bool:
    return minio.stored_events() == 0


async def _errors_are(settings: ProcessorSettings, number: float) -> bool:
    return await _errors(settings) == number


async def _errors(settings: ProcessorSettings) -> float:
    async with aiohttp.ClientSession(settings.s3_endpoint) as session, session.get("/minio/metrics/v3/notification") as answer:
        text = await answer.text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == ERRORS)
