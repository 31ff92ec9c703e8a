"""The bridge as a process: follower, scans and the purge of old rows, side by side until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import structlog

from infra import kafka, metadata_store, object_store, vector_store
from infra.errors import ConfigurationError, TransientError
from infra.followed_buckets import followed_buckets
from infra.health import Check, HealthServer
from infra.kafka.interface import Broker, Producer
from infra.metadata_store.interface import MetadataStore
from infra.object_store.interface import ObjectStore
from infra.retry import until_done
from infra.settings import BridgeSettings
from infra.vector_store.interface import VectorStore
from ingest_bridge.asked_jobs import AskedJobs, MakeEvents
from ingest_bridge.backlog import Backlog
from ingest_bridge.canary import Canary
from ingest_bridge.follower import Follower
from ingest_bridge.meta_tail import MetaTail, TailTarget, find_weed
from ingest_bridge.notifications.seaweedfs import BUCKETS_DIR
from ingest_bridge.receiver import Receiver
from ingest_bridge.relay import Relay
from ingest_bridge.scan import Scan
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_jobs import RETRY_SECONDS, ScanSchedule, ScanWorker
from ingest_bridge.scan_state import RemovalGuard, ScanProgress
from schemas.jobs import ScanArguments

log = structlog.get_logger(__name__)

BUCKET_WATCH = "bucket watch"
PURGE_PAUSE_SECONDS = 3600.0
PURGE_PAGE = 1000
DAY_US = 24 * 3600 * 1_000_000


Part = Callable[[], Coroutine[Any, Any, None]]
"""Runs until it is cancelled, and tidies up then."""


async def run(settings: BridgeSettings) -> None:
    """Work until SIGTERM or SIGINT. Whatever ends a part of it ends all of it, and is raised here."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    serving = asyncio.create_task(serve(settings))
    # The start waits for stores that are down, and can be stopped meanwhile.
    await asyncio.wait([stopped, serving], return_when=asyncio.FIRST_COMPLETED)
    for task in (stopped, serving):
        task.cancel()
    await asyncio.wait([stopped, serving])
    if not serving.cancelled():
        await serving
    log.info("bridge stopped")


async def serve(settings: BridgeSettings) -> None:
    """Work until cancelled.

    When a bucket is added or taken away, all parts are ended and made anew for the buckets of now: that is rare, and a start
    does what a new bucket needs, a scan of what it holds already and a place in its log.
    """
    while True:
        await _serve_these_buckets(settings)
        log.info("the buckets that are followed have changed")


async def _serve_these_buckets(settings: BridgeSettings) -> None:
    """Returns when the buckets have changed."""
    async with _parts(settings) as parts:
        tasks = [asyncio.create_task(part(), name=name) for name, part in parts.items()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in done:
            if task.get_name() != BUCKET_WATCH or task.exception() is not None:
                log.error("a part of the bridge died", part=task.get_name())
            await task


@asynccontextmanager
async def _parts(settings: BridgeSettings) -> AsyncIterator[dict[str, Part]]:
    async with AsyncExitStack() as stack:
        objects = await object_store.connect(settings)
        stack.push_async_callback(objects.close)
        metadata = await metadata_store.connect(settings)
        stack.push_async_callback(metadata.close)
        # No part of the health checks: without it scans wait, and new pictures are told of all the same.
        vectors = await vector_store.connect(settings)
        stack.push_async_callback(vectors.close)
        broker = await kafka.connect(settings)
        stack.push_async_callback(broker.close)
        await until_done(metadata.check, on_wait=_say_waiting)
        configured = settings
        followed = await until_done(partial(followed_buckets, configured, metadata), on_wait=_say_waiting)
        settings = configured.model_copy(update={"buckets": followed})
        log.info("bridge started", follow=settings.follow, buckets=settings.buckets)
        schedule = ScanSchedule(metadata, settings.buckets, interval_seconds=settings.scan_interval_seconds)
        checks: dict[str, Check] = {
            "object_store": lambda: _check_buckets(objects, settings),
            "metadata_store": metadata.check,
            "broker": broker.check,
        }
        make_events = scan_events(settings, objects, broker, await _producer(stack, broker))
        scans = scan_worker(
            settings, objects=objects, metadata=metadata, vectors=vectors, make_events=make_events, schedule=schedule
        )
        asked = AskedJobs(
            configured, objects=objects, metadata=metadata, vectors=vectors, make_events=make_events, owner=_owner()
        )
        parts: dict[str, Part] = {
            BUCKET_WATCH: partial(until_buckets_change, configured, metadata, followed),
            "scan schedule": schedule.run,
            "scans": scans.run,
            "asked jobs": asked.run,
            "purge": partial(_purge, metadata, settings.deleted_retention_days),
        }
        if settings.follow == "seaweedfs":
            # A producer of its own: what a scan writes must not stand before a new picture.
            following = follower(settings, metadata, await _producer(stack, broker), schedule)
            checks["change_log"] = following.check
            parts["follower"] = following.run
        elif settings.follow == "notifications":
            relay = Relay(
                deployment=settings.deployment,
                buckets=settings.buckets,
                broker=broker,
                producer=await _producer(stack, broker),
                on_gap=schedule.want_all,
            )
            checks["notifications"] = relay.check
            parts["relay"] = relay.run
            if settings.bridge_canary_interval_seconds:
                trial = canary(settings, objects, broker, schedule)
                checks["canary"] = trial.check
                parts["canary"] = trial.run
        routes = []
        if settings.bridge_webhook_secret.get_secret_value():
            routes.append(receiver(settings, await _producer(stack, broker), schedule).route())
        health = HealthServer(settings.bridge_host, settings.bridge_port, checks, routes)
        await _start(health, settings)
        stack.push_async_callback(health.close)
        yield parts


def follower(settings: BridgeSettings, metadata: MetadataStore, producer: Producer, schedule: ScanSchedule) -> Follower:
    """One child for all buckets: it takes 100 MB. Raises ConfigurationError without the weed program."""
    find_weed(settings.seaweedfs_weed)
    one = settings.buckets[0] if len(settings.buckets) == 1 else None
    target = TailTarget(
        program=settings.seaweedfs_weed,
        filer=settings.seaweedfs_filer,
        path_prefix=f"{BUCKETS_DIR}{one}/" if one else BUCKETS_DIR,
        config_dir=settings.seaweedfs_config_dir,
    )

    async def start_tail(since_ns: int) -> MetaTail:
        return await MetaTail.start(target, since_ns=since_ns, now_ns=time.time_ns())

    return Follower(
        deployment=settings.deployment,
        buckets=settings.buckets,
        overlap_seconds=settings.follow_overlap_seconds,
        start_tail=start_tail,
        producer=producer,
        metadata=metadata,
        on_gap=schedule.want_all,
    )


def canary(settings: BridgeSettings, objects: ObjectStore, broker: Broker, schedule: ScanSchedule) -> Canary:
    return Canary(
        # The same at every start, so that what a killed bridge left is replaced.
        name=f"{socket.gethostname()[:64]}-{settings.bridge_port}",
        buckets=settings.buckets,
        targets=settings.notification_arns,
        interval_seconds=settings.bridge_canary_interval_seconds,
        objects=objects,
        broker=broker,
        on_gap=schedule.want_all,
    )


def receiver(settings: BridgeSettings, producer: Producer, schedule: ScanSchedule) -> Receiver:
    return Receiver(
        secret=settings.bridge_webhook_secret.get_secret_value(),
        deployment=settings.deployment,
        buckets=settings.buckets,
        producer=producer,
        on_gap=schedule.want_all,
        body_bytes=settings.bridge_webhook_body_bytes,
        timeout_seconds=settings.bridge_webhook_timeout_seconds,
    )


def scan_worker(
    settings: BridgeSettings,
    *,
    objects: ObjectStore,
    metadata: MetadataStore,
    vectors: VectorStore,
    make_events: MakeEvents,
    schedule: ScanSchedule,
) -> ScanWorker:
    def make_scan(scan_id: str, arguments: ScanArguments, progress: ScanProgress) -> Scan:
        return Scan(
            arguments,
            progress,
            events=make_events(scan_id, progress),
            guard=RemovalGuard(settings.scan_removal_limit, settings.scan_removal_share),
            objects=objects,
            metadata=metadata,
            vectors=vectors,
        )

    return ScanWorker(
        metadata,
        make_scan,
        buckets=settings.buckets,
        owner=_owner(),
        on_failed=lambda bucket: schedule.want(bucket, after_seconds=RETRY_SECONDS),
    )


def scan_events(settings: BridgeSettings, objects: ObjectStore, broker: Broker, producer: Producer) -> MakeEvents:
    backlog = Backlog(
        broker,
        floor_events=settings.scan_backlog_events,
        seconds=settings.scan_backlog_seconds,
        commit_interval_seconds=settings.commit_interval_seconds,
    )

    def make(job_id: str, progress: ScanProgress) -> ScanEvents:
        return ScanEvents(job_id, progress, deployment=settings.deployment, objects=objects, producer=producer, backlog=backlog)

    return make


def _owner() -> str:
    """Of jobs: no other process has this name, also after a restart under the same number."""
    return f"{socket.gethostname()[:64]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


async def _producer(stack: AsyncExitStack, broker: Broker) -> Producer:
    producer = await until_done(broker.producer, on_wait=_say_waiting)
    stack.push_async_callback(producer.close)
    return producer


async def _check_buckets(objects: ObjectStore, settings: BridgeSettings) -> None:
    for bucket in settings.buckets:
        await objects.check(bucket)


async def _start(health: HealthServer, settings: BridgeSettings) -> None:
    try:
        await health.start()
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {settings.bridge_host}:{settings.bridge_port} ({error.strerror}): set IMAGE_SEARCH_BRIDGE_PORT"
        ) from None


async def until_buckets_change(settings: BridgeSettings, metadata: MetadataStore, followed: Sequence[str]) -> None:
    """`followed`: as they were when the parts were made."""
    while True:
        await asyncio.sleep(settings.bucket_poll_seconds)
        try:
            if await followed_buckets(settings, metadata) != followed:
                return
        except TransientError as error:
            log.warning("whether buckets were added cannot be seen just now", reason=str(error))


async def _purge(metadata: MetadataStore, retention_days: int) -> None:
    """Forget deleted rows once every topic that could still name them has."""
    while True:
        before_us = time.time_ns() // 1000 - retention_days * DAY_US
        try:
            while purged := await metadata.purge_deleted(before_us=before_us, limit=PURGE_PAGE):
                log.info("deleted rows purged", rows=purged)
        except TransientError as error:
            log.warning("the purge waits", reason=str(error))
        await asyncio.sleep(PURGE_PAUSE_SECONDS)


def _say_waiting(error: TransientError, attempt: int) -> None:
    log.warning("waiting to start", error=str(error), attempt=attempt)
