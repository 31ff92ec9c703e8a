"""MinIO's own notifications through Kafka to object events, on the real servers."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from pydantic import SecretStr

from infra import kafka, metadata_store, object_store
from infra.errors import ConfigurationError
from infra.kafka.interface import Broker
from infra.local_stack import ports
from infra.object_store.interface import NotificationRule
from infra.settings import BridgeSettings, ProcessorSettings
from ingest_bridge import provision, service
from schemas.events import Cause, ObjectEvent
from schemas.topics import OBJECT_NOTIFICATIONS, OBJECTS, RELAY_GROUP
from tests.conftest import FreshSettings, Servers
from tests.s3_client import Bucket

PATIENCE_SECONDS = 60.0
LONG_KEY = "/".join(["k" * 200] * 5) + "/" + "j" * 19
ODD_KEYS = (
    "a b.jpg",
    "a+b.jpg",
    "a%20b.jpg",
    "100%.jpg",
    "dir/ä é.jpg",
    "日本/写真.png",
    "ends in a space ",
    "Case.jpg",
    "case.jpg",
    "q?x#y&z=1.jpg",
    LONG_KEY,
)


class Deployment:
    """A bucket of its own on MinIO, whose notifications come on the topic that all share."""

    def __init__(self, settings: BridgeSettings, broker: Broker) -> None:
        self.settings = settings
        self.broker = broker
        self.bucket = Bucket(settings)
        self.events: list[ObjectEvent] = []
        self._offsets: dict[int, int] = {}

    async def begin(self) -> None:
        self._offsets = {number: end for number, (_, end) in (await self.broker.offsets(OBJECTS)).items()}

    async def read_new(self) -> None:
        ends = {number: end for number, (_, end) in (await self.broker.offsets(OBJECTS)).items()}
        if all(self._offsets[number] >= end for number, end in ends.items()):
            return
        async with self.broker.read(OBJECTS, self._offsets) as pages:
            async for page in pages:
                for record in page:
                    self._offsets[record.partition] = record.offset + 1
                    event = ObjectEvent.model_validate_json(record.value)
                    if event.data.bucket == self.bucket.name:
                        assert record.key == event.data.ref.topic_key
                        self.events.append(event)
                if all(self._offsets[number] >= end for number, end in ends.items()):
                    return

    def said_of(self, key: str) -> str:
        """`+` for each change and `-` for each removal that was announced, in the order of the topic."""
        found = [event.data for event in self.events if event.data.key == key and event.data.cause is Cause.NOTIFICATION]
        return "".join("-" if change.removed else "+" for change in found)

    async def until_said(self, *keys: str) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not all(self.said_of(key) for key in keys):
                await asyncio.sleep(0.05)
                await self.read_new()

    async def pending(self) -> int:
        return sum(lag.pending for lag in await self.broker.lag(OBJECT_NOTIFICATIONS, RELAY_GROUP))

    @asynccontextmanager
    async def bridge(self) -> AsyncIterator[asyncio.Task[None]]:
        """The whole service, stopped in order behind the block."""
        running = asyncio.create_task(service.serve(self.settings))
        try:
            yield running
        finally:
            running.cancel()
            await asyncio.wait([running])
            if not running.cancelled() and (error := running.exception()):
                raise error


@pytest.fixture
async def deployment(full_settings: FreshSettings) -> AsyncIterator[Deployment]:
    settings = full_settings(BridgeSettings, kafka_topic_prefix="", bridge_port=ports.find_free(1)[0], scan_backlog_events=1000)
    await metadata_store.upgrade_schema(settings)
    await provision.upgrade_step(ProcessorSettings.model_validate(settings.model_dump()), print)
    broker = await kafka.connect(settings)
    deployment = Deployment(settings, broker)
    await deployment.begin()
    yield deployment
    await broker.close()


async def test_every_kind_of_change_and_every_key_arrives_once(deployment: Deployment) -> None:
    bucket = deployment.bucket
    async with deployment.bridge():
        for key in ODD_KEYS:
            await bucket.put(key)
        await bucket.put("a.jpg", b"first")
        await bucket.put("a.jpg", b"second")
        await bucket.do("put_object_tagging", "a.jpg", Tagging={"TagSet": [{"Key": "k", "Value": "v"}]})
        await bucket.copy("a.jpg", "copy.jpg")
        await bucket.put_in_parts("parts.bin", b"x" * (5 << 20), b"y" * 1000)
        await bucket.put("zero.jpg", b"")
        await bucket.put("folder/marker/", b"")
        await bucket.put("gone.jpg")
        await bucket.do("delete_object", "gone.jpg")
        await bucket.put("last.jpg")
        await deployment.until_said("last.jpg")
        # The second copy of each comes from the stored queue, up to three seconds later.
        await asyncio.sleep(4)
        await deployment.read_new()
        assert await deployment.pending() == 0
    said = {key: deployment.said_of(key) for key in {event.data.key for event in deployment.events}}
    assert said == {
        **dict.fromkeys(ODD_KEYS, "+"),
        "a.jpg": "+++",
        "copy.jpg": "+",
        "parts.bin": "+",
        "zero.jpg": "+",
        "folder/marker/": "+",
        "gone.jpg": "+-",
        "last.jpg": "+",
    }
    for key in (*ODD_KEYS, "a.jpg", "copy.jpg", "parts.bin", "zero.jpg"):
        last = [event.data for event in deployment.events if event.data.key == key][-1]
        assert last.put_time is not None
        assert (last.etag, last.put_time.timestamp()) == await bucket.head(key), key


async def test_a_notification_is_an_event_within_a_blink(deployment: Deployment) -> None:
    """The direct target: by the stored one alone it would take three seconds."""
    async with deployment.bridge():
        await deployment.bucket.put("first.jpg")
        await deployment.until_said("first.jpg")
        started = time.monotonic()
        await deployment.bucket.put("second.jpg")
        await deployment.until_said("second.jpg")
        assert time.monotonic() - started < 1.5


async def test_nothing_is_lost_while_the_broker_is_away(deployment: Deployment, servers: Servers) -> None:
    keys = [f"{number}.jpg" for number in range(5)]
    async with deployment.bridge() as running:
        await deployment.bucket.put("before.jpg")
        await deployment.until_said("before.jpg")
        async with servers.stack.paused("kafka"):
            for key in keys:
                await deployment.bucket.put(key)
        assert not running.done()
        await deployment.until_said(*keys)


async def test_a_broker_that_is_killed_again_and_again_stops_nothing(deployment: Deployment, servers: Servers) -> None:
    async with deployment.bridge() as running:
        for turn in range(2):
            await deployment.bucket.put(f"before-{turn}.jpg")
            servers.stack.kill("kafka")
            await deployment.bucket.put(f"while-{turn}.jpg")
            await servers.stack.wait_ready("kafka")
            await deployment.until_said(f"before-{turn}.jpg", f"while-{turn}.jpg")
        assert not running.done()


async def test_bridges_share_the_work_and_one_that_stops_leaves_it_to_the_other(deployment: Deployment) -> None:
    other = Deployment(deployment.settings.model_copy(update={"bridge_port": ports.find_free(1)[0]}), deployment.broker)
    keys = [f"{number}.jpg" for number in range(60)]
    async with deployment.bridge() as staying:
        async with other.bridge() as leaving:
            for key in keys[:30]:
                await deployment.bucket.put(key)
            await deployment.until_said(keys[0])
            assert not leaving.done()
        for key in keys[30:]:
            await deployment.bucket.put(key)
        await deployment.until_said(*keys)
        assert not staying.done()


async def test_provision_keeps_rules_of_others_and_changes_nothing_twice(deployment: Deployment) -> None:
    settings, name = deployment.settings, deployment.bucket.name
    store = await object_store.connect(settings)
    try:
        ours = await store.notification_rules(name)
        assert {rule.target for rule in ours} == set(settings.notification_arns)
        events = frozenset({"s3:ObjectCreated:Put"})
        foreign = NotificationRule(settings.notification_arns[0], events, "theirs", prefix="logs/", suffix=".txt")
        await store.set_notification_rules(name, [foreign])
        said: list[str] = []
        await provision.provision(settings, said.append, dry_run=True)
        assert said[0].splitlines()[0].endswith("would change:")
        assert await store.notification_rules(name) == [foreign]
        await provision.provision(settings, said.append)
        assert {*await store.notification_rules(name)} == {foreign, *ours}
        await provision.provision(settings, said.append)
        assert f"notification rules of {name}: as they shall be" in said
    finally:
        await store.close()


async def test_a_target_that_minio_does_not_have_is_named(deployment: Deployment) -> None:
    settings = deployment.settings.model_copy(update={"notification_arns": ("arn:minio:sqs::nobody:kafka",)})
    with pytest.raises(ConfigurationError, match="nobody"):
        await provision.provision(settings, print)


async def test_rules_that_somebody_takes_away_are_noticed(deployment: Deployment) -> None:
    settings = deployment.settings.model_copy(update={"bridge_canary_interval_seconds": 1.0})
    url = f"http://127.0.0.1:{settings.bridge_port}"
    deployment.settings = settings
    store = await object_store.connect(settings)

    async def until_canary_says(session: aiohttp.ClientSession, said: str) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                async with session.get("/healthz/ready") as answer:
                    if (await answer.json())["components"]["canary"] == said:
                        return
                await asyncio.sleep(0.2)

    try:
        async with deployment.bridge(), aiohttp.ClientSession(url) as session:
            await deployment.bucket.put("started.jpg")
            await deployment.until_said("started.jpg")
            await until_canary_says(session, "ok")
            await store.set_notification_rules(deployment.bucket.name, [])
            await until_canary_says(session, "StoreUnavailable")
            await provision.provision(settings, print)
            await until_canary_says(session, "ok")
            async with session.get("/metrics") as answer:
                flights = re.findall(r'image_search_canary_seconds_count\{step="removal"\} ([1-9].*)', await answer.text())
            assert flights
    finally:
        await store.close()
    assert {event.data.key for event in deployment.events} == {"started.jpg"}


async def test_a_notification_by_webhook(deployment: Deployment) -> None:
    record = {
        "eventSource": "aws:s3",
        "eventName": "ObjectCreated:Put",
        "eventTime": "2026-03-01T10:20:30.456Z",
        "s3": {"bucket": {"name": deployment.bucket.name}, "object": {"key": "called+in.jpg"}},
    }
    deployment.settings = deployment.settings.model_copy(update={"bridge_webhook_secret": SecretStr("open sesame")})
    url = f"http://127.0.0.1:{deployment.settings.bridge_port}"
    async with deployment.bridge(), aiohttp.ClientSession(url) as session:
        await deployment.bucket.put("started.jpg")
        await deployment.until_said("started.jpg")
        async with session.post("/notifications", json={"Records": [record]}) as answer:
            assert answer.status == 401
        session.headers["Authorization"] = "Bearer open sesame"
        async with session.post("/notifications", data=b"x" * (2 << 20)) as answer:
            assert answer.status == 413
        async with session.post("/notifications", json={"Records": [record]}) as answer:
            assert answer.status == 204
        await deployment.read_new()
        assert deployment.said_of("called in.jpg") == "+"


async def test_without_a_secret_there_is_no_webhook(deployment: Deployment) -> None:
    url = f"http://127.0.0.1:{deployment.settings.bridge_port}"
    async with deployment.bridge(), aiohttp.ClientSession(url, headers={"Authorization": "Bearer "}) as session:
        await deployment.bucket.put("started.jpg")
        await deployment.until_said("started.jpg")
        async with session.post("/notifications", json={"Records": []}) as answer:
            assert answer.status == 404
