"""The full profile with TLS and passwords between all parts, and an account for each service: it works, and only so."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
import pytest
import sqlalchemy
from botocore.config import Config
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from infra import kafka, metadata_store, object_store, vector_store
from infra.errors import ObjectGone, StoreRefused, StoreUnavailable
from infra.kafka.interface import Message
from infra.local_stack import ports, servers
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials, StackFolder
from infra.metadata_store import upgrade_schema
from infra.settings import ENV_PREFIX, CommonSettings, ProcessorSettings, StackSettings
from schemas.identity import RESERVED_PREFIX, ContentHash, ObjectRef
from schemas.topics import OBJECT_NOTIFICATIONS, OBJECTS, OUTCOMES, PROCESSOR_GROUP, RELAY_GROUP, Topic
from schemas.vectors import VectorRow
from tests.conftest import require_full_servers
from tests.deployment import environment_of
from tests.e2e.conftest import Deployment
from tests.pictures import edited_copy, jpeg
from tests.stack import IMAGE_SEARCH, FullStack

READERS = ("bridge", "worker", "query")
OTHER_SECRET = "another-secret"


@dataclass(frozen=True)
class Encrypted:
    """A stack with TLS. `settings`: what each service uses, by its name; `admin`: what commands use."""

    deployment: Deployment
    settings: dict[str, CommonSettings]
    other_ca: Path

    def admin(self, **changes: object) -> CommonSettings:
        """As `settings`, but for these."""
        given = self.settings["admin"]
        return CommonSettings.model_validate(
            {**{name: getattr(given, name) for name in CommonSettings.model_fields}, **changes}
        )


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    require_full_servers()
    base = tmp_path_factory.mktemp("tls")
    other = Certificates(base / "other")
    other.prepare()
    with FullStack.running(base, arguments=("--profile", "full"), IMAGE_SEARCH_STACK_TLS="true") as stack:
        folder, stack_settings = StackFolder(stack.state_dir, "full"), stack.settings(StackSettings)
        credentials = Credentials.of(folder)
        shared = servers.addresses(folder, stack_settings, credentials)
        accounts = {"admin": {}, **servers.service_accounts(folder, stack_settings, credentials)}
        settings = {name: CommonSettings.model_validate({**shared, **own}) for name, own in accounts.items()}
        variables = stack.variables()
        s3 = boto3.client(
            "s3",
            endpoint_url=variables["S3_ENDPOINT"],
            aws_access_key_id=variables["S3_ACCESS_KEY"],
            aws_secret_access_key=variables["S3_SECRET_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
            verify=variables["CA_FILE"],
        )
        yield Encrypted(Deployment("full", stack, s3, variables["S3_BUCKET"]), settings, other.ca)
        s3.close()


# -- it works ----------------------------------------------------------------------------------------------------------
def test_a_picture_is_found_and_lost_again_and_the_stores_agree(encrypted: Encrypted) -> None:
    """By its notification: the next scan is far away."""
    deployment, picture = encrypted.deployment, jpeg(1)
    token = deployment.put("tls/one.jpg", picture)
    deployment.put("tls/other.jpg", jpeg(2))
    hits = deployment.search(picture, wait_for=token)
    assert hits[0]["key"] == "tls/one.jpg" and hits[0]["score"] == pytest.approx(100, abs=0.1)
    assert deployment.search(edited_copy(picture))[0]["key"] == "tls/one.jpg"
    assert deployment.image("tls/one.jpg", wait_for=deployment.delete("tls/one.jpg")).status_code == 404
    checked = deployment.stack.run("verify", "--json")
    assert json.loads(checked.stdout)["clean"]


def test_every_service_and_the_canary_are_well(encrypted: Encrypted) -> None:
    status = json.loads(encrypted.deployment.stack.run("status", "--json").stdout)
    assert status["well"], status


@pytest.mark.parametrize("command", [("verify",), ("scan", "--prefix", "tls/")], ids=" ".join)
def test_the_bridges_account_does_for_the_commands(encrypted: Encrypted, command: tuple[str, ...]) -> None:
    settings = encrypted.settings["bridge"]
    own = {
        f"{ENV_PREFIX}S3_ACCESS_KEY": settings.s3_access_key,
        f"{ENV_PREFIX}S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
        f"{ENV_PREFIX}KAFKA_USERNAME": settings.kafka_username,
        f"{ENV_PREFIX}KAFKA_PASSWORD": settings.kafka_password.get_secret_value(),
        f"{ENV_PREFIX}MILVUS_TOKEN": settings.milvus_token.get_secret_value(),
        f"{ENV_PREFIX}DATABASE_URL": settings.database_url.get_secret_value(),
    }
    stack = encrypted.deployment.stack
    FullStack(stack.process, stack.state_dir, {**stack.environment, **own}, stack.log).run(*command)


# -- who does not belong is refused, and told what may be wrong ---------------------------------------------------------
KAFKA_DOUBTS = (
    pytest.param(
        {"kafka_security_protocol": "PLAINTEXT", "kafka_ca_file": "", "kafka_username": "", "kafka_password": ""},
        "does not speak PLAINTEXT",
        id="plain",
    ),
    pytest.param({"kafka_security_protocol": "SSL", "kafka_username": "", "kafka_password": ""}, "speak SSL", id="no user"),
    pytest.param({"kafka_ca_file": "OTHER"}, "another CA .*KAFKA_CA_FILE", id="another CA"),
    pytest.param({"kafka_password": OTHER_SECRET}, "user or password .*KAFKA_USERNAME", id="wrong password"),
    pytest.param({"kafka_sasl_mechanism": "PLAIN"}, "user or password", id="another mechanism"),
)


def changes_of(encrypted: Encrypted, changes: dict[str, object]) -> CommonSettings:
    return encrypted.admin(**{name: encrypted.other_ca if value == "OTHER" else value for name, value in changes.items()})


@pytest.mark.parametrize(("changes", "said"), KAFKA_DOUBTS)
async def test_kafka_lets_nobody_else_in(encrypted: Encrypted, changes: dict[str, object], said: str) -> None:
    broker = await kafka.connect(changes_of(encrypted, {**changes, "kafka_timeout_seconds": 5.0}))
    with pytest.raises(StoreUnavailable, match=f"no way in.*{said}"):
        await broker.check()
    await broker.close()


def test_a_worker_with_a_wrong_password_says_so_and_waits(encrypted: Encrypted, tmp_path: Path) -> None:
    given = encrypted.settings["worker"]
    settings = ProcessorSettings.model_validate(
        {
            **{name: getattr(given, name) for name in CommonSettings.model_fields},
            "kafka_password": OTHER_SECRET,
            "processor_port": ports.find_free(1)[0],
            "processor_data_dir": tmp_path,
        }
    )
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        environment = {**os.environ, **environment_of(settings)}
        worker = subprocess.Popen([IMAGE_SEARCH, "worker"], env=environment, stdout=output, stderr=output, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while "does not take this user or password" not in log.read_text():
            assert worker.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        assert OTHER_SECRET not in log.read_text()
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"s3_ca_file": "OTHER"}, "another CA .*S3_CA_FILE", id="another CA"),
        pytest.param({"s3_ca_file": ""}, "another CA .*S3_CA_FILE", id="what the system trusts"),
        pytest.param({"s3_secret_key": OTHER_SECRET}, "denies access .*check access key, secret key", id="wrong password"),
    ],
)
async def test_minio_lets_nobody_else_in(encrypted: Encrypted, changes: dict[str, object], said: str) -> None:
    await refused_by_object_store(changes_of(encrypted, changes), said)


async def test_minio_does_not_speak_without_tls(encrypted: Encrypted) -> None:
    plain = encrypted.settings["admin"].s3_endpoint.replace("https:", "http:")
    await refused_by_object_store(encrypted.admin(s3_endpoint=plain, s3_ca_file=""), "object store")


async def refused_by_object_store(settings: CommonSettings, said: str) -> None:
    store = await object_store.connect(settings)
    with pytest.raises((StoreUnavailable, StoreRefused), match=said):
        await store.read(ObjectRef(settings.buckets[0], "tls/other.jpg"), max_bytes=10**7)
    await store.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"milvus_ca_file": "OTHER"}, "another CA .*MILVUS_CA_FILE", id="another CA"),
        pytest.param({"milvus_server_name": "elsewhere"}, "another host", id="another host"),
        pytest.param({"milvus_token": f"root:{OTHER_SECRET}"}, "user or password .*MILVUS_TOKEN", id="wrong password"),
        pytest.param({"milvus_ca_file": "", "milvus_uri": "PLAIN"}, "it speaks TLS", id="plain"),
    ],
)
async def test_milvus_lets_nobody_else_in(encrypted: Encrypted, changes: dict[str, object], said: str) -> None:
    plain = encrypted.settings["admin"].milvus_uri.replace("https:", "http:")
    settings = changes_of(encrypted, {name: plain if value == "PLAIN" else value for name, value in changes.items()})
    store = await vector_store.connect(settings)
    with pytest.raises(StoreUnavailable, match=f"no way in.*{said}"):
        await store.has_collection("any")
    await store.close()


@pytest.mark.parametrize("wrong", ["plain", "another CA", "wrong password"])
async def test_the_database_lets_nobody_else_in(encrypted: Encrypted, wrong: str) -> None:
    url = make_url(encrypted.settings["worker"].database_url.get_secret_value())
    changed = {
        "plain": url.set(query={}),
        "another CA": url.update_query_dict({"ssl_ca": str(encrypted.other_ca)}),
        "wrong password": url.set(password=OTHER_SECRET),
    }[wrong]
    settings = encrypted.admin(database_url=changed.render_as_string(hide_password=False))
    store = await metadata_store.connect(settings)
    with pytest.raises(StoreUnavailable):
        await store.check()
    await store.close()


# -- each service may do what it needs, and nothing else ----------------------------------------------------------------
@pytest.mark.parametrize("service", READERS)
async def test_a_service_reads_objects_and_tells_a_missing_one_from_a_denied_one(encrypted: Encrypted, service: str) -> None:
    settings = encrypted.settings[service]
    (bucket,) = settings.buckets
    encrypted.deployment.put("kept.jpg", jpeg(3))
    store = await object_store.connect(settings)
    assert (await store.stat(ObjectRef(bucket, "kept.jpg"))).size
    assert [page async for page in store.list_pages(bucket, prefix="kept")]
    with pytest.raises(ObjectGone):
        await store.read(ObjectRef(bucket, "missing.jpg"), max_bytes=100)
    rules = await store.notification_rules(bucket) if service == "bridge" else []
    canary, own = ObjectRef(bucket, f"{RESERVED_PREFIX}canary/test"), ObjectRef(bucket, "own.jpg")
    if service == "bridge":
        await store.put(canary, b"canary")
        await store.delete(canary)
    else:
        await denied(lambda: store.notification_rules(bucket))
    if service == "query":
        # On behalf of whoever has a key that may write.
        await store.put(own, jpeg(4))
        await store.delete(own)
    else:
        await denied(lambda: store.put(own, b"x"))
        await denied(lambda: store.delete(ObjectRef(bucket, "kept.jpg")))
    if service == "worker":
        await denied(lambda: store.put(canary, b"x"))
    await denied(lambda: store.set_notification_rules(bucket, rules))
    await denied(lambda: store.ensure_bucket(f"{bucket}-more"))
    await store.close()


async def test_who_upgrades_reads_no_object(encrypted: Encrypted) -> None:
    settings = encrypted.settings["upgrade"]
    (bucket,) = settings.buckets
    store = await object_store.connect(settings)
    assert len(await store.notification_rules(bucket)) == 2
    await denied(lambda: store.read(ObjectRef(bucket, "kept.jpg"), max_bytes=10**7))
    await denied(lambda: store.delete(ObjectRef(bucket, "kept.jpg")))
    await store.close()


async def denied(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(StoreRefused, match="denies access"):
        await call()


@pytest.mark.parametrize("service", READERS)
def test_a_service_changes_no_table(encrypted: Encrypted, service: str) -> None:
    statements = ["DROP TABLE images", "CREATE TABLE more (a INT)", "ALTER TABLE images ADD a INT", "CREATE USER x"]
    statements += ["SELECT * FROM mysql.user"]
    if service == "query":
        statements += ["DELETE FROM images", "UPDATE images SET width = 1", "INSERT INTO cursors (name) VALUES ('x')"]
        statements += ["UPDATE jobs SET state = 'done'", "DELETE FROM jobs", "DELETE FROM models", "DELETE FROM api_keys"]
    url = make_url(encrypted.settings[service].database_url.get_secret_value())
    engine = sqlalchemy.create_engine(
        url.set(drivername="mysql+pymysql", query={}), connect_args={"ssl": {"ca": url.query["ssl_ca"]}}
    )
    with engine.connect() as connection:
        assert connection.scalar(sqlalchemy.text("SELECT count(*) FROM images"))
        assert connection.execute(sqlalchemy.text("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1].startswith("TLS_")
    for statement in statements:
        with engine.connect() as connection, pytest.raises(OperationalError, match="denied"):
            connection.execute(sqlalchemy.text(statement))
    engine.dispose()


async def test_who_upgrades_changes_tables(encrypted: Encrypted) -> None:
    assert "already" in await upgrade_schema(encrypted.settings["upgrade"])


@pytest.mark.parametrize(
    ("service", "topic"),
    [("worker", OBJECTS), ("query", OUTCOMES), ("bridge", OBJECT_NOTIFICATIONS), ("upgrade", OBJECTS)],
    ids=lambda value: getattr(value, "name", value),
)
async def test_a_service_writes_to_its_own_topics_only(encrypted: Encrypted, service: str, topic: Topic) -> None:
    broker = await kafka.connect(encrypted.settings[service])
    producer = await broker.producer()
    # Of the cluster: who may write to no topic may not even begin to.
    with pytest.raises(StoreUnavailable, match=r"(Topic|Cluster)AuthorizationFailed"):
        await producer.send(topic, [Message(b"images/x.jpg", b"{}", {})])
    await producer.close()
    await broker.close()


@pytest.mark.parametrize("service", READERS)
async def test_a_service_makes_no_topic(encrypted: Encrypted, service: str) -> None:
    broker = await kafka.connect(encrypted.settings[service])
    with pytest.raises(StoreUnavailable, match="TopicAuthorizationFailed"):
        await broker.ensure_topics([Topic("more", 1000)], partitions=1, replication=1)
    await broker.close()


async def test_a_reader_of_a_groups_lag_is_no_member_of_it(encrypted: Encrypted) -> None:
    broker = await kafka.connect(encrypted.settings["query"])
    assert await broker.lag(OBJECTS, PROCESSOR_GROUP)
    with pytest.raises(StoreUnavailable, match="GroupAuthorizationFailed"):
        async with broker.consume(OBJECT_NOTIFICATIONS, RELAY_GROUP) as reader:
            await reader.batch()
    await broker.close()


@pytest.mark.parametrize("service", ["bridge", "query", "worker"])
async def test_a_service_keeps_the_collection(encrypted: Encrypted, service: str) -> None:
    admin = await vector_store.connect(encrypted.settings["admin"])
    metadata = await metadata_store.connect(encrypted.settings[service])
    (model,) = await metadata.models()
    await metadata.close()
    name, ref = model.collection, ObjectRef("tls-rights", service)
    row = VectorRow(
        ref.object_id,
        ref=ref,
        vector=np.eye(1, model.dimension, dtype=np.float32)[0],
        content_hash=ContentHash(bytes(32)),
        put_time_us=0,
        size=1,
        width=1,
        height=1,
        format="JPEG",
    )
    store = await vector_store.connect(encrypted.settings[service])
    await store.check(name)
    before = await store.count(name)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.drop_collection(name),
        lambda: store.create_collection("more", dimension=8),
    ]
    if service == "worker":
        await store.upsert(name, [row])
        await store.delete(name, [ref.object_id])
    else:
        calls += [lambda: store.upsert(name, [row]), lambda: store.delete(name, [ref.object_id])]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="denies this to our user"):
            await call()
    assert await admin.count(name) == before
    await store.close()
    await admin.close()
