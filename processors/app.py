"""The worker process: the Faust app with its one agent, the services beside it, and how all of it starts and stops.

Facts about Faust that shape this file stand in ARCHITECTURE.md ("What Faust does to you").
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import faust
import faust.streams
import structlog
from faust.auth import Credentials
from mode import Service
from mode.types.signals import BaseSignalT

from infra import kafka, metadata_store, object_store, vector_store
from infra.errors import ConfigurationError, TransientError
from infra.health import Check, HealthServer
from infra.kafka.interface import Broker
from infra.kafka.security import Security
from infra.metadata_store.interface import ModelRow
from infra.retry import until_done
from infra.settings import ProcessorSettings
from infra.vector_store.interface import VectorStore
from processors.delivery import Batcher
from processors.embedding.active_model import active_model, settled
from processors.embedding.catalog import fingerprint
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.open_models import OpenModels, model_of_row
from processors.model_jobs import ModelJobs
from processors.outcomes import RowMaker
from processors.pipeline import AfterStep, Pipeline
from processors.progress import Progress
from processors.publishing import Publisher
from processors.reading import Reader, ReadingRules
from processors.vectors import Vectorizer
from schemas.topics import OBJECTS, PROCESSOR_GROUP

log = structlog.get_logger(__name__)

COMMIT_SECONDS = 5.0
STREAM_BUFFER_EVENTS = 64
# Longer than the batcher waits for batches in flight, and the commit and the producer after it.
STUCK_SECONDS = 60.0


def make_app(settings: ProcessorSettings, batcher: Batcher) -> faust.App:
    """The Faust app with its agent. Nothing connects before it is started."""
    if getattr(faust.streams, "_CStreamIterator", None) is None:
        # The pure-Python stream acknowledges messages of an older group generation without handing them to us.
        raise ConfigurationError("faust-streaming runs without its compiled part: install its wheel, and unset NO_CYTHON")
    app = faust.App(
        settings.kafka_topic_prefix + PROCESSOR_GROUP,
        broker=[f"kafka://{address}" for address in settings.kafka_bootstrap],
        broker_credentials=_credentials(Security.from_settings(settings)),
        autodiscover=False,
        broker_commit_interval=settings.commit_interval_seconds,
        broker_heartbeat_interval=settings.session_timeout_seconds / 3.5,
        broker_session_timeout=settings.session_timeout_seconds,
        # A store may be down for longer than any default: the group must not take the partitions away meanwhile.
        broker_max_poll_interval=3600.0 * settings.max_poll_interval_hours,
        broker_request_timeout=max(settings.kafka_timeout_seconds, settings.session_timeout_seconds + 5),
        consumer_auto_offset_reset="earliest",
        datadir=str(settings.processor_data_dir),
        key_serializer="raw",
        logging_config=None,
        store="memory://",
        stream_buffer_maxsize=STREAM_BUFFER_EVENTS,
        # Waiting would hang every rebalance for as long as a store is down; what is unfinished is read again elsewhere.
        stream_wait_empty=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        value_serializer="raw",
        web_enabled=False,
        worker_redirect_stdouts=False,
    )
    topic = app.topic(OBJECTS.full_name(settings.kafka_topic_prefix), key_serializer="raw", value_serializer="raw")

    async def take_in(stream: Any) -> None:  # noqa: ANN401 - Faust's stream type is generic over what `raw` gives
        try:
            async for event in stream.noack().events():
                await batcher.put(event)
        except Exception as error:
            # Faust would restart the agent for ever: end the process, and with it the doubt about what was read.
            await app.crash(error)
            raise

    app.agent(topic, concurrency=1, name="take-in")(take_in)

    async def finish(_sender: Any, /, *_arguments: Any, signal: BaseSignalT[Any], **_more: Any) -> None:  # noqa: ANN401
        # Faust stops its consumer before acknowledgements made during the shutdown are committed: finish, then commit.
        await batcher.stop()
        if app.crash_reason is None and batcher.crash_reason is None:
            await asyncio.wait_for(app.consumer.commit(), COMMIT_SECONDS)

    async def drop(_sender: Any, /, *_arguments: Any, **_more: Any) -> None:  # noqa: ANN401
        batcher.drop()

    app.on_before_shutdown.connect(finish, weak=False)
    app.on_partitions_revoked.connect(drop, weak=False)
    return app


def _credentials(security: Security) -> Credentials | None:
    if security.with_password:
        return faust.SASLCredentials(
            username=security.username,
            password=security.password,
            ssl_context=security.context,
            mechanism=security.mechanism,
        )
    return None if security.context is None else faust.SSLCredentials(security.context)


class Watchdog(Service):
    """Ends a process that has work and makes no progress. Waiting for a store known to be down is progress."""

    def __init__(self, progress: Progress, has_work: Callable[[], Awaitable[bool]], *, limit_seconds: float) -> None:
        super().__init__()
        self._progress, self._has_work, self._limit = progress, has_work, limit_seconds

    @Service.task
    async def _watch(self) -> None:
        last, since = self._progress.steps, time.monotonic()
        while not self.should_stop:
            await self.sleep(min(5.0, self._limit / 4))
            if self._progress.steps != last or not await self._has_work():
                last, since = self._progress.steps, time.monotonic()
            elif time.monotonic() - since > self._limit:
                await self.crash(RuntimeError(f"no progress for {self._limit:g} s although there is work"))


async def run(settings: ProcessorSettings, *, after_step: AfterStep | None = None) -> int:
    """Work until SIGTERM or SIGINT. Returns the exit status: 0 after a clean stop, 1 when a part of it died."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with ExitStack() as last_resort:
        async with _parts(settings, after_step) as (batcher, watchdog, app):
            await batcher.start()
            await app.start()
            await watchdog.start()
            log.info("worker started")
            await _first_of(stop.wait(), *(service._crashed.wait() for service in (app, batcher, watchdog)))
            log.info("worker stops", asked=stop.is_set())
            if watchdog.crashed:
                last_resort.enter_context(ended_within(STUCK_SECONDS))
            await watchdog.stop()
            await app.stop()
            await batcher.stop()
            reasons = [service.crash_reason for service in (app, batcher, watchdog) if service.crash_reason]
    for reason in reasons:
        log.error("worker died", error=repr(reason))
    return 1 if reasons else 0


@contextmanager
def ended_within(seconds: float, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """The process ends with status 1 when the block takes longer. A clean stop waits for the call that runs on the model's
    thread: should that be what is stuck, it never returns, and a thread cannot be killed."""

    def give_up() -> None:
        log.error("worker ends without tidying up: a part of it does not return", seconds=seconds)
        end(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@asynccontextmanager
async def _parts(
    settings: ProcessorSettings, after_step: AfterStep | None
) -> AsyncIterator[tuple[Batcher, Watchdog, faust.App]]:
    progress = Progress()
    async with AsyncExitStack() as stack:
        objects = await object_store.connect(settings)
        stack.push_async_callback(objects.close)
        metadata = await metadata_store.connect(settings)
        stack.push_async_callback(metadata.close)
        vectors = await vector_store.connect(settings)
        stack.push_async_callback(vectors.close)
        broker = await kafka.connect(settings)
        stack.push_async_callback(broker.close)
        await until_done(metadata.check, on_wait=_say_waiting)
        # Faust would end the process, and say less of a broker that is not there or does not let us in.
        await until_done(broker.check, on_wait=_say_waiting)
        own = await until_done(partial(settled, settings, metadata), on_wait=_say_waiting)
        asked = fingerprint(chosen(own), precision_asked(own))
        model = await until_done(lambda: active_model(metadata, asked, own.model), on_wait=_say_waiting)
        log.info("model", name=model.name, precision=model.precision, collection=model.collection)
        models = OpenModels(metadata, partial(_vectorizer, vectors=vectors, settings=settings, progress=progress))
        stack.push_async_callback(models.close)
        await until_done(models.start, on_wait=_say_waiting)
        producer = await until_done(broker.producer, on_wait=_say_waiting)
        stack.push_async_callback(producer.close)
        pipeline = Pipeline(
            reader=Reader(objects, _reading_rules(settings), on_wait=progress.waited),
            models=KeptModels(models, progress),
            metadata=metadata,
            vectors=vectors,
            publisher=Publisher(producer, metadata, progress),
            rows=RowMaker(settings.deployment),
            batch_bytes=settings.batch_bytes,
            progress=progress,
            **({"after_step": after_step} if after_step else {}),
        )
        jobs = ModelJobs(
            settings,
            objects=objects,
            metadata=metadata,
            vectors=vectors,
            models=models,
            owner=f"{os.uname().nodename}/{os.getpid()}",
        )
        stack.push_async_callback(_cancelled, asyncio.create_task(jobs.run()))
        batcher = Batcher(
            pipeline.process,
            batch_size=settings.batch_size,
            batches_in_flight=settings.batches_in_flight,
            queue_events=settings.queue_events,
            after_ack=(lambda: after_step(11)) if after_step else None,
        )
        watchdog = Watchdog(progress, _has_work(broker, batcher, settings), limit_seconds=settings.watchdog_seconds)
        checks: dict[str, Check] = {
            "object_store": lambda: objects.check(settings.buckets[0]),
            "metadata_store": metadata.check,
            "vector_store": lambda: vectors.check((models.active_row or model).collection),
            "broker": broker.check,
        }
        health = HealthServer(settings.processor_host, settings.processor_port, checks)
        await health.start()
        stack.push_async_callback(health.close)
        yield batcher, watchdog, make_app(settings, batcher)


class KeptModels:
    """Of the models that are open, what the pipeline needs; it looks at the table before every batch."""

    def __init__(self, models: OpenModels[Vectorizer], progress: Progress) -> None:
        self._models, self._progress = models, progress

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[Sequence[Vectorizer]]:
        # A batch that looked a moment before a model was added leaves it without those objects: its reindexing finds them.
        await until_done(self._models.refresh, on_wait=self._progress.waited)
        async with self._models.in_use() as vectorizers:
            yield vectorizers


@asynccontextmanager
async def _vectorizer(
    row: ModelRow, *, vectors: VectorStore, settings: ProcessorSettings, progress: Progress
) -> AsyncIterator[Vectorizer]:
    async with model_of_row(row, settings) as (decoder, embedder):
        yield Vectorizer(row, vectors=vectors, decoder=decoder, embedder=embedder, on_wait=progress.waited)


def _reading_rules(settings: ProcessorSettings) -> ReadingRules:
    return ReadingRules(
        max_object_bytes=settings.max_object_bytes,
        read_concurrency=settings.read_concurrency,
        read_give_up_seconds=settings.read_give_up_seconds,
        include=settings.include,
        exclude=settings.exclude,
    )


def _has_work(broker: Broker, batcher: Batcher, settings: ProcessorSettings) -> Callable[[], Awaitable[bool]]:
    async def has_work() -> bool:
        if batcher.in_hand:
            return True
        try:
            lag = await broker.lag(OBJECTS, PROCESSOR_GROUP)
        except TransientError:
            return False  # a broker that is down gives no work; Faust waits for it
        return any(partition.pending for partition in lag)

    return has_work


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _say_waiting(error: TransientError, attempt: int) -> None:
    log.warning("waiting to start", error=str(error), attempt=attempt)


async def _first_of(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
