"""A deployment on the real servers with everything its own, and workers as processes that a test may kill."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import KafkaError  # type: ignore[import-untyped]  # aiokafka ships no types
from prometheus_client.parser import text_string_to_metric_families

from infra import kafka, metadata_store, object_store
from infra.kafka.interface import Broker, Message, Producer, Record
from infra.local_stack import ports
from infra.metadata_store.interface import ImageRow, MetadataStore
from infra.metadata_store.schema import upgrade_schema
from infra.object_store.interface import ObjectStore
from infra.settings import ENV_PREFIX, ProcessorSettings
from infra.verify import Report, verify
from ingest_bridge.provision import upgrade_step as make_topics_and_buckets
from processors.commands import upgrade_step as make_model_and_collection
from schemas.events import Cause, ObjectChange, ObjectEvent, OutcomeEvent
from schemas.identity import ObjectRef
from schemas.topics import DEAD_LETTERS, OBJECTS, OUTCOMES, PROCESSOR_GROUP, Topic
from tests.failpoints import Failpoint, Gate
from tests.pictures import jpeg

SETTLE_SECONDS = 120.0


def environment_of(settings: ProcessorSettings) -> dict[str, str]:
    """The settings as a service gets them: as environment variables."""
    values: dict[str, str] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is None:
            continue
        if hasattr(value, "get_secret_value"):
            value = value.get_secret_value()
        values[f"{ENV_PREFIX}{name.upper()}"] = ",".join(value) if isinstance(value, tuple) else str(value)
    return values


class WorkerProcess:
    """A worker as a process, which may have a failpoint."""

    program: ClassVar[str] = "tests.faults.worker"

    def __init__(self, settings: ProcessorSettings, folder: Path, *, name: str, failpoint: Failpoint = ()) -> None:
        self.log = folder / f"{name}.log"
        self.port = settings.processor_port
        environment = {**os.environ, **environment_of(settings)}
        environment[f"{ENV_PREFIX}PROCESSOR_DATA_DIR"] = str(folder / name)
        command = [sys.executable, "-m", self.program, *failpoint]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    async def wait_dead(self, seconds: float = SETTLE_SECONDS) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.process.wait), seconds)

    async def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return await self.wait_dead(60)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    async def says(self, words: str, *, times: int = 1) -> bool:
        """Whether its log holds these words so many times."""
        return (await asyncio.to_thread(self.log.read_text)).count(words) >= times

    async def metric(self, name: str, **labels: str) -> float:
        """What it counts, as it says itself; over all labels that are not named."""
        text = await asyncio.to_thread(self._metrics)
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def embedded(self) -> int:
        """Vectors that it computed so far."""
        return int(await self.metric("image_search_vectors_total", origin="embedded"))

    async def has_in_hand(self, events: int) -> bool:
        return await self.metric("image_search_events_in_hand") == events

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text


@dataclass
class Deployment:
    settings: ProcessorSettings
    folder: Path
    objects: ObjectStore
    metadata: MetadataStore
    broker: Broker
    producer: Producer
    workers: list[WorkerProcess] = field(default_factory=list)

    @property
    def bucket(self) -> str:
        return self.settings.buckets[0]

    def worker(self, failpoint: Failpoint = (), **changes: object) -> WorkerProcess:
        settings = self.settings.model_copy(update={"processor_port": ports.find_free(1)[0], **changes})
        worker = WorkerProcess(settings, self.folder, name=f"worker-{len(self.workers)}", failpoint=failpoint)
        self.workers.append(worker)
        return worker

    async def put(self, key: str, data: bytes) -> ObjectEvent:
        """Put an object and return the notification about it, not yet sent."""
        stat = await self.objects.put(ObjectRef(self.bucket, key), data, "image/jpeg")
        put_time = datetime.fromtimestamp(stat.put_time_us / 1e6, UTC)
        return self.event(key, etag=stat.etag, put_time=put_time, size=stat.size)

    async def remove(self, key: str) -> ObjectEvent:
        await self.objects.delete(ObjectRef(self.bucket, key))
        return self.event(key, removed=True)

    def event(self, key: str, *, bucket: str | None = None, cause: Cause = Cause.NOTIFICATION, **hints: object) -> ObjectEvent:
        ref = ObjectRef(bucket or self.bucket, key)
        change = ObjectChange.model_validate({"bucket": ref.bucket, "key": key, "cause": cause, **hints})
        return ObjectEvent(id="1", source="/image-search/test/t", subject=str(ref), time=datetime.now(UTC), data=change)

    async def send(self, events: Iterable[ObjectEvent]) -> None:
        await self.producer.send(OBJECTS, [Message(event.data.ref.topic_key, event.to_json()) for event in events])

    async def send_as_one_batch(self, events: Sequence[ObjectEvent], worker: WorkerProcess, gate: Gate) -> None:
        """Returns when these events, and no others, are a batch that waits at the worker's gate.

        A batch forms of what waits. So one more object stands at the gate until all the others wait behind it. The worker
        works on one batch at a time, and a batch has room for all.
        """
        gate.close()
        await self.send([await self.put("ahead-of-the-batch.jpg", jpeg(0, (120, 90)))])
        await gate.reached()
        await self.send(events)
        await until(lambda: worker.has_in_hand(1 + len(events)))
        gate.close()
        gate.open()
        await gate.reached()

    async def send_raw(self, *values: bytes) -> None:
        await self.producer.send(OBJECTS, [Message(b"raw", value) for value in values])

    async def lag(self) -> int:
        return sum(partition.pending for partition in await self.broker.lag(OBJECTS, PROCESSOR_GROUP))

    async def committed(self) -> int:
        """Events that the workers have committed, over all partitions; the next offset where there is one partition."""
        return sum(partition.committed for partition in await self.broker.lag(OBJECTS, PROCESSOR_GROUP))

    async def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Until the workers have committed everything that was sent."""
        deadline = time.monotonic() + seconds
        while lag := await self.lag():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{lag} events are still to be worked on\n{self.last_lines()}")
            await asyncio.sleep(0.1)

    async def is_shared_by(self, workers: int) -> bool:
        """Whether the group is settled with so many members, each with partitions of its own."""
        return len(await self.members()) == workers

    async def members(self) -> set[str]:
        """Who is in the group, when it is settled. A worker that is thrown out and comes back has another name."""
        admin = AIOKafkaAdminClient(bootstrap_servers=list(self.settings.kafka_bootstrap))
        await admin.start()
        try:
            [answer] = await admin.describe_consumer_groups([self.settings.kafka_topic_prefix + PROCESSOR_GROUP])
        except KafkaError as error:
            if not error.retriable:
                raise
            return set()  # a broker that has just started has no coordinator yet
        finally:
            await admin.close()
        [group] = answer.to_object()["groups"]
        return {member["member_id"] for member in group["members"]} if group["state"] == "Stable" else set()

    async def row(self, key: str) -> ImageRow | None:
        object_id = ObjectRef(self.bucket, key).object_id
        return (await self.metadata.rows([object_id])).get(object_id)

    async def rows(self) -> dict[str, ImageRow]:
        return {row.ref.key: row for row in await self.metadata.list_rows(bucket=self.bucket)}

    async def outcomes(self) -> list[OutcomeEvent]:
        return [OutcomeEvent.model_validate_json(record.value) for record in await self.records(OUTCOMES)]

    async def dead_letters(self) -> list[Record]:
        return await self.records(DEAD_LETTERS)

    async def records(self, topic: Topic) -> list[Record]:
        offsets = await self.broker.offsets(topic)
        left = {partition: end for partition, (begin, end) in offsets.items() if end > begin}
        found: list[Record] = []
        async with self.broker.read(topic, {partition: begin for partition, (begin, _) in offsets.items()}) as pages:
            while left:
                for record in await anext(pages):
                    found.append(record)
                    if record.offset + 1 >= left.get(record.partition, 0):
                        left.pop(record.partition, None)
        return found

    async def verified(self) -> Report:
        report = await verify(self.settings)
        assert report.clean, f"{report.to_json()}\n{self.last_lines()}"
        return report

    def last_lines(self) -> str:
        return "\n".join(line for worker in self.workers for line in worker.log.read_text().splitlines()[-15:])


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = SETTLE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def deployed(settings: ProcessorSettings, folder: Path) -> AsyncIterator[Deployment]:
    """Schema, topics, bucket and collection made; nothing runs yet. What was started is killed at the end."""
    await upgrade_schema(settings)
    await make_topics_and_buckets(settings, print)
    await make_model_and_collection(settings, print)
    async with AsyncExitStack() as stack:
        objects = await object_store.connect(settings)
        stack.push_async_callback(objects.close)
        metadata = await metadata_store.connect(settings)
        stack.push_async_callback(metadata.close)
        broker = await kafka.connect(settings)
        stack.push_async_callback(broker.close)
        producer = await broker.producer()
        stack.push_async_callback(producer.close)
        deployment = Deployment(settings, folder, objects, metadata, broker, producer)
        try:
            yield deployment
        finally:
            for worker in deployment.workers:
                worker.kill()
