"""Promise: nothing is wiped by accident (invariant 11). A bucket that looks empty does not empty the index by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from infra import kafka, metadata_store, object_store
from infra.kafka.interface import Broker
from infra.metadata_store.interface import ImageRow, MetadataStore, RowWrite
from infra.settings import BridgeSettings
from ingest_bridge import service
from ingest_bridge.scan_jobs import SCAN_JOB
from schemas.identity import ObjectRef, content_hash_of
from schemas.tables import JobState, RowState
from schemas.topics import ALL_TOPICS, OBJECTS
from tests.conftest import FreshSettings

ROWS = 130
PATIENCE_SECONDS = 60.0


@pytest.fixture
async def settings(fresh_settings: FreshSettings) -> AsyncIterator[BridgeSettings]:
    """An empty bucket whose pictures are all indexed: as after a wrong mount, or somebody's `rm -r`."""
    from infra.local_stack import ports

    made = fresh_settings(BridgeSettings, bridge_port=ports.find_free(1)[0], scan_backlog_events=1000)
    await metadata_store.upgrade_schema(made)
    objects = await object_store.connect(made)
    await objects.ensure_bucket(made.buckets[0])
    await objects.close()
    yield made


@pytest.fixture
async def stores(settings: BridgeSettings) -> AsyncIterator[tuple[Broker, MetadataStore]]:
    broker, metadata = await kafka.connect(settings), await metadata_store.connect(settings)
    await broker.ensure_topics(ALL_TOPICS, partitions=2, replication=1)
    rows = [
        ImageRow(
            ref=ObjectRef(settings.buckets[0], f"{number}.jpg"),
            state=RowState.INDEXED,
            generation=1,
            published_generation=1,
            content_hash=content_hash_of(b"%d" % number),
            etag="e",
            put_time_us=1_000_000,
        )
        for number in range(ROWS)
    ]
    await metadata.write([RowWrite(row, 0) for row in rows])
    yield broker, metadata
    await broker.close()
    await metadata.close()


async def test_a_scan_that_would_remove_most_of_an_index_stops_until_it_is_told(
    settings: BridgeSettings, stores: tuple[Broker, MetadataStore]
) -> None:
    broker, metadata = stores
    bucket = settings.buckets[0]
    running = asyncio.create_task(service.serve(settings))
    try:
        stopped = await metadata.add_job(SCAN_JOB, {"bucket": bucket})
        assert await ended(metadata, stopped.job_id) is JobState.STOPPED
        found = await metadata.job(stopped.job_id)
        assert found is not None
        assert found.message is not None
        assert "--allow-removal" in found.message
        assert str(ROWS) in found.message
        assert await written(broker) == 0

        told = await metadata.add_job(SCAN_JOB, {"bucket": bucket, "allow_removal": True})
        assert await ended(metadata, told.job_id) is JobState.DONE
        assert await written(broker) == ROWS
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def ended(metadata: MetadataStore, job_id: str) -> JobState:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            job = await metadata.job(job_id)
            if job is not None and job.state not in (JobState.QUEUED, JobState.RUNNING):
                return job.state
            await asyncio.sleep(0.05)


async def written(broker: Broker) -> int:
    return sum(end - begin for begin, end in (await broker.offsets(OBJECTS)).values())
