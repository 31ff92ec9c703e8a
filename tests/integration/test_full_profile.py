"""The servers of the full profile, as `image-search up --profile full` runs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.parse
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import boto3
import psutil
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from botocore.config import Config
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import OperationalError

from infra import kafka, metadata_store, object_store
from infra.kafka.interface import Broker, Record
from infra.local_stack import minio
from infra.metadata_store import upgrade_schema
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.settings import CommonSettings
from schemas.identity import ObjectRef
from schemas.tables import RowState, metadata
from schemas.topics import OBJECT_NOTIFICATIONS
from tests.conftest import FreshSettings, Servers

SECONDS = 60


def database_of(settings: CommonSettings) -> URL:
    return make_url(settings.database_url.get_secret_value()).set(drivername="mysql+pymysql")


# -- what they keep ----------------------------------------------------------------------------------------------------
async def test_a_killed_minio_comes_back_with_its_objects(full_servers: Servers) -> None:
    store = await object_store.connect(full_servers.settings)
    ref = ObjectRef(f"full-{uuid.uuid4().hex[:12]}", "kept.jpg")
    await store.ensure_bucket(ref.bucket)
    await store.put(ref, b"bytes")
    full_servers.stack.kill("minio")
    async with asyncio.timeout(SECONDS):
        await full_servers.stack.wait_ready("minio")
    assert (await store.read(ref, max_bytes=100)).data == b"bytes"
    await store.close()


async def test_a_killed_mariadb_comes_back_with_what_was_committed(full_servers: Servers, full_settings: FreshSettings) -> None:
    settings = full_settings(CommonSettings)
    await upgrade_schema(settings)
    store = await metadata_store.connect(settings)
    ref = ObjectRef("images", "kept.jpg")
    await store.write([RowWrite(ImageRow(ref, RowState.IGNORED, generation=1, published_generation=0), 0)])
    full_servers.stack.kill("mariadb")
    async with asyncio.timeout(SECONDS):
        await full_servers.stack.wait_ready("mariadb")
    assert (await store.rows([ref.object_id]))[ref.object_id].generation == 1
    await store.close()


async def test_the_migrations_make_exactly_the_tables_on_mariadb(full_settings: FreshSettings) -> None:
    settings = full_settings(CommonSettings)
    said = await asyncio.gather(*(upgrade_schema(settings) for _ in range(3)))
    assert sum("upgraded" in line for line in said) == 1, "upgrades at once wait for each other"
    engine = sqlalchemy.create_engine(database_of(settings))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


# -- who may reach them ------------------------------------------------------------------------------------------------
async def test_who_has_no_key_is_refused(full_servers: Servers) -> None:
    endpoint = full_servers.settings.s3_endpoint
    async with aiohttp.ClientSession() as session:
        for call in (
            session.put(f"{endpoint}/images/x.jpg", data=b"x"),
            session.get(endpoint),
            session.get(f"{endpoint}/minio/"),
        ):
            async with call as answer:
                assert answer.status in (403, 404)
    ours = database_of(full_servers.settings)
    for url in (ours.set(password="wrong"), ours.set(username="root", password=None), ours.set(username="", password=None)):
        with pytest.raises(OperationalError, match="Access denied"), sqlalchemy.create_engine(url).connect():
            pass


def test_the_database_user_reaches_its_own_databases_only(full_servers: Servers) -> None:
    engine = sqlalchemy.create_engine(database_of(full_servers.settings))
    for statement in ("CREATE DATABASE imageXsearch", "SELECT * FROM mysql.user", "SELECT LOAD_FILE('/etc/passwd') IS NULL"):
        with engine.connect() as connection:
            if "LOAD_FILE" in statement:
                assert connection.scalar(sqlalchemy.text(statement)) == 1
                continue
            with pytest.raises(OperationalError, match="denied"):
                connection.execute(sqlalchemy.text(statement))
    engine.dispose()


def test_they_listen_on_this_machine_only_and_on_ports_that_are_settings(full_servers: Servers) -> None:
    taken: dict[str, set[int]] = {}
    for running in full_servers.stack.programs:
        assert running.pid is not None
        for connection in psutil.Process(running.pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr:
                assert connection.laddr.ip in ("127.0.0.1", "::1")
                taken.setdefault(running.program.name, set()).add(connection.laddr.port)
    assert taken == {"minio": {full_servers.ports.s3_port}, "mariadb": {full_servers.ports.mariadb_port}}


# -- notifications -----------------------------------------------------------------------------------------------------
@dataclass
class Announced:
    """A bucket that both of MinIO's targets announce, and what came of it."""

    s3: Any  # boto3 makes its clients at run time and has no types
    broker: Broker
    bucket: str

    async def put(self, key: str) -> None:
        await asyncio.to_thread(self.s3.put_object, Bucket=self.bucket, Key=key, Body=b"x")

    async def keys(self, start: dict[int, int], wanted: int, *, seconds: float) -> list[str]:
        """The keys of our bucket in what came behind these offsets: until there are so many, or until the time is over."""
        found: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self.broker.read(OBJECT_NOTIFICATIONS, start) as pages:
                async for page in pages:
                    found += [key for record in page if (key := self._key(record)) is not None]
                    if len(found) >= wanted:
                        break
        return found

    def _key(self, record: Record) -> str | None:
        entity = json.loads(record.value)["Records"][0]["s3"]
        assert record.key.decode().startswith(entity["bucket"]["name"] + "/")
        return urllib.parse.unquote_plus(entity["object"]["key"]) if entity["bucket"]["name"] == self.bucket else None

    async def ends(self) -> dict[int, int]:
        return {partition: end for partition, (_, end) in (await self.broker.offsets(OBJECT_NOTIFICATIONS)).items()}


@pytest.fixture
async def announced(full_servers: Servers) -> AsyncIterator[Announced]:
    settings = full_servers.settings
    broker = await kafka.connect(settings)
    await broker.ensure_topics([OBJECT_NOTIFICATIONS], partitions=2, replication=1)
    s3 = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    bucket = f"full-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(Bucket=bucket)
    rules = [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]} for arn in minio.ARNS]
    s3.put_bucket_notification_configuration(Bucket=bucket, NotificationConfiguration={"QueueConfigurations": rules})
    yield Announced(s3, broker, bucket)
    s3.close()
    await broker.close()


async def test_every_put_is_announced_by_both_targets_and_by_the_direct_one_at_once(announced: Announced) -> None:
    start = await announced.ends()
    keys = [f"a b/ä+{number}.jpg" for number in range(4)]
    for key in keys:
        behind = await announced.ends()
        await announced.put(key)
        # The stored ones come every three seconds: it may be one of these once, not each time.
        assert key in await announced.keys(behind, 1, seconds=1.0)
    assert sorted(await announced.keys(start, 2 * len(keys), seconds=SECONDS)) == sorted(keys * 2)


async def test_what_was_put_while_kafka_was_away_is_announced_when_it_is_back(servers: Servers, announced: Announced) -> None:
    start = await announced.ends()
    async with servers.stack.paused("kafka"):
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", servers.ports.kafka_port)
        for number in range(2):
            await announced.put(f"{number}.jpg")
    assert set(await announced.keys(start, 2, seconds=SECONDS)) == {"0.jpg", "1.jpg"}
