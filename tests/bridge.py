"""The bridge's parts one at a time, on real servers: notifications without a scan, scans without notifications."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from infra import kafka
from infra.local_stack import ports
from infra.metadata_store.interface import MetadataStore
from infra.settings import BridgeSettings, ProcessorSettings
from ingest_bridge import service
from ingest_bridge.relay import Relay
from ingest_bridge.scan_jobs import SCAN_JOB
from schemas.tables import JobState
from tests.deployment import Deployment

SCAN_SECONDS = 120.0


def bridge_settings(settings: ProcessorSettings, **changes: object) -> BridgeSettings:
    """The same deployment, as the bridge is told of it."""
    values = {name: getattr(settings, name) for name in BridgeSettings.model_fields if hasattr(settings, name)}
    return BridgeSettings.model_validate({**values, "bridge_port": ports.find_free(1)[0], **changes})


@asynccontextmanager
async def relaying(settings: ProcessorSettings) -> AsyncIterator[None]:
    """Notifications become object events, and nothing else is done: whatever they miss stays missing."""
    broker = await kafka.connect(settings)
    producer = await broker.producer()
    relay = Relay(
        deployment=settings.deployment, buckets=settings.buckets, broker=broker, producer=producer, on_gap=lambda: None
    )
    running = asyncio.create_task(relay.run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await producer.close()
        await broker.close()


@asynccontextmanager
async def scanning(settings: ProcessorSettings) -> AsyncIterator[None]:
    """The bridge without a change log: what happened while nobody looked is found by its scans alone."""
    running = asyncio.create_task(service.serve(bridge_settings(settings, follow="none")))
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def scan(deployment: Deployment) -> None:
    """One scan of each bucket, and the work that comes of it."""
    wanted = [await deployment.metadata.add_job(SCAN_JOB, {"bucket": bucket}) for bucket in deployment.settings.buckets]
    async with scanning(deployment.settings), asyncio.timeout(SCAN_SECONDS):
        for job in wanted:
            assert await _ended(deployment.metadata, job.job_id) is JobState.DONE
    await deployment.settle()


async def _ended(metadata: MetadataStore, job_id: str) -> JobState:
    while True:
        job = await metadata.job(job_id)
        if job is not None and job.state not in (JobState.QUEUED, JobState.RUNNING):
            return job.state
        await asyncio.sleep(0.1)
