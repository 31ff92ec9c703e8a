"""TLS and passwords between the parts: what clients are made with, the stack's certificates, and what each service may do."""

from __future__ import annotations

import re
import ssl
from datetime import timedelta
from pathlib import Path

import faust
import pytest

from infra import kafka, object_store, vector_store
from infra.errors import ConfigurationError
from infra.kafka.connection import Connection
from infra.local_stack import certificates, kafka_access, policies, servers
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials, StackFolder
from infra.metadata_store.engine import parse_url
from infra.settings import CommonSettings, ProcessorSettings, StackSettings
from processors.app import make_app
from processors.delivery import Batcher
from schemas.identity import RESERVED_PREFIX
from schemas.topics import ALL_TOPICS, PROCESSOR_GROUP, RELAY_GROUP

SASL = {"kafka_security_protocol": "SASL_SSL", "kafka_username": "worker", "kafka_password": "hunter2"}
HTTPS = {"s3_endpoint": "https://store:9000", "milvus_uri": "https://vectors:19530"}


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    found = Certificates(tmp_path / "certificates")
    found.prepare()
    return found


# -- clients -----------------------------------------------------------------------------------------------------------
def test_every_kafka_client_is_made_with_certificate_and_password(made: Certificates) -> None:
    connection = Connection.from_settings(CommonSettings.model_validate({**SASL, "kafka_ca_file": made.ca}))
    options = connection.options
    context = options.pop("ssl_context")
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
    assert [ca["subject"] for ca in context.get_ca_certs()] == [((("commonName", "image-search stack"),),)]
    assert {name: value for name, value in options.items() if name.startswith(("sasl", "security"))} == {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "worker",
        "sasl_plain_password": "hunter2",
    }
    assert "hunter2" not in repr(connection)


@pytest.mark.parametrize(
    ("given", "protocol"),
    [
        ({}, None),
        ({"kafka_security_protocol": "SSL"}, "SSL"),
        (SASL, "SASL_SSL"),
        ({**SASL, "kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "PLAIN"}, "SASL_PLAINTEXT"),
    ],
)
async def test_the_workers_consumer_is_made_with_the_same(given: dict[str, str], protocol: str | None, tmp_path: Path) -> None:
    settings = ProcessorSettings.model_validate({**given, "processor_data_dir": tmp_path})

    async def nothing(_events: object, _is_ours: object) -> None: ...

    app = make_app(settings, Batcher(nothing, batch_size=1, batches_in_flight=1, queue_events=1))
    credentials = app.conf.broker_credentials
    if protocol is None:
        assert credentials is None
        return
    if isinstance(credentials, faust.SSLCredentials):
        context: ssl.SSLContext | None = credentials.context
    else:
        assert isinstance(credentials, faust.SASLCredentials)
        context = credentials.ssl_context
        assert (credentials.username, credentials.password) == ("worker", "hunter2")
        assert credentials.mechanism.value == settings.kafka_sasl_mechanism
    assert credentials.protocol.value == protocol
    assert (context is not None and context.verify_mode is ssl.CERT_REQUIRED) == protocol.endswith("SSL")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({**SASL, "kafka_ca_file": "BAD"}, "KAFKA_CA_FILE"),
        ({**SASL, "kafka_certificate_file": "BAD", "kafka_key_file": "BAD"}, "CERTIFICATE_FILE"),
        ({**HTTPS, "s3_ca_file": "BAD"}, "S3_CA_FILE"),
        ({**HTTPS, "milvus_ca_file": "BAD"}, "MILVUS_CA_FILE"),
    ],
)
@pytest.mark.parametrize("missing", [True, False])
async def test_a_file_that_is_no_certificate_is_named_before_anything_is_sent(
    given: dict[str, str], said: str, missing: bool, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.pem"
    if not missing:
        bad.write_text("no certificate")
    settings = CommonSettings.model_validate({name: bad if value == "BAD" else value for name, value in given.items()})
    connect = {"K": kafka.connect, "C": kafka.connect, "S": object_store.connect, "M": vector_store.connect}[said[0]]
    with pytest.raises(ConfigurationError, match=said):
        await connect(settings)


# -- certificates of a stack -------------------------------------------------------------------------------------------
def test_the_stacks_files_are_its_owners_alone_and_are_kept(made: Certificates) -> None:
    files = sorted(made.folder.iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in files if "PRIVATE KEY" in path.read_text()] == ["keystore.pem", "server.key"]
    assert made.key.read_text() in made.keystore.read_text(), "the CA's own key is nowhere"
    before = [path.read_bytes() for path in files]
    made.prepare()
    assert [path.read_bytes() for path in files] == before


def test_a_certificate_about_to_end_is_made_anew_with_its_ca(made: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made.ca.read_bytes()
    monkeypatch.setattr(certificates, "VALID", certificates.RENEWED_BEFORE - timedelta(days=1))
    Certificates(made.folder.with_name("short")).prepare()
    short = Certificates(made.folder.with_name("short"))
    first = short.ca.read_bytes()
    monkeypatch.undo()
    short.prepare()
    assert short.ca.read_bytes() != first
    made.prepare()
    assert made.ca.read_bytes() == before


def handshake(ca: Path, server: Certificates, host: str) -> None:
    """Client and server in memory. Raises ssl.SSLError."""
    answering = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    answering.load_cert_chain(server.server, server.key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=ca).wrap_bio(to_client, to_server, server_hostname=host)
    listener = answering.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, listener, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_the_certificate_is_of_this_ca_and_for_this_machine(made: Certificates, tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other")
    other.prepare()
    for host in ("127.0.0.1", "localhost"):
        handshake(made.ca, made, host)
    for ca, host in ((made.ca, "elsewhere.example"), (other.ca, "127.0.0.1")):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(ca, made, host)


# -- what a stack with TLS is told ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("tls", [True, False])
def test_all_addresses_are_encrypted_or_none_is(tmp_path: Path, tls: bool) -> None:
    folder, settings = StackFolder(tmp_path, "full"), StackSettings.model_validate({"stack_tls": tls})
    folder.make()
    credentials = Credentials.of(folder)
    shared = servers.addresses(folder, settings, credentials)
    for service, own in servers.service_accounts(folder, settings, credentials).items():
        made = CommonSettings.model_validate({**shared, **own})
        assert made.s3_endpoint.startswith("https:") is made.milvus_uri.startswith("https:") is tls
        assert made.kafka_security_protocol == ("SASL_SSL" if tls else "PLAINTEXT")
        url = parse_url(made.database_url.get_secret_value())
        assert ("ssl_ca" in url.query) is tls
        assert (made.s3_access_key == made.kafka_username == url.username == service) is tls


def test_the_embedded_profile_cannot_do_it() -> None:
    servers.require_possible("full", StackSettings.model_validate({"stack_tls": True}))
    with pytest.raises(ConfigurationError, match="--profile full"):
        servers.require_possible("embedded", StackSettings.model_validate({"stack_tls": True}))


def test_no_password_of_kafka_is_on_a_command_line(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path, "full")
    folder.make()
    credentials = Credentials.of(folder)
    options = " ".join(kafka_access.user_options(credentials))
    passwords = kafka_access.passwords(credentials)
    assert options.count("--add-scram") == len(passwords) == len(set(passwords.values()))
    assert not [password for password in passwords.values() if password in options]


# -- least privilege -----------------------------------------------------------------------------------------------------
def actions(user: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for statement in policies.object_store(user, ["images"])["Statement"]:
        assert statement["Effect"] == "Allow"
        for place in statement["Resource"]:
            found.setdefault(place, set()).update(statement["Action"])
    return found


@pytest.mark.parametrize("service", policies.SERVICES)
def test_who_reads_objects_may_list_them_and_only_the_query_service_and_the_canary_write(service: str) -> None:
    """Without ListBucket a missing key answers 403, and nothing is ever removed from the index."""
    bucket, objects = "arn:aws:s3:::images", "arn:aws:s3:::images/*"
    found = actions(service)
    assert "s3:ListBucket" in found[bucket]
    changes = {"s3:PutObject", "s3:DeleteObject"} if service == "query" else set()
    assert found.get(objects, set()) <= {"s3:GetObject", *changes}
    assert changes <= found.get(objects, set())
    assert ("s3:CreateBucket" in found[bucket]) == (service == "upgrade")
    canary = {f"arn:aws:s3:::images/{RESERVED_PREFIX}*"} if service == "bridge" else set()
    assert set(found) - {bucket, objects} == canary


def test_a_policy_names_every_bucket_and_no_other() -> None:
    (read, listing) = policies.object_store("worker", ["a", "b"])["Statement"]
    assert read["Resource"] == ["arn:aws:s3:::a/*", "arn:aws:s3:::b/*"]
    assert listing["Resource"] == ["arn:aws:s3:::a", "arn:aws:s3:::b"]


def test_grants_at_the_broker_are_for_topics_and_groups_that_there_are() -> None:
    names = {"topic": {topic.name for topic in ALL_TOPICS}, "group": {RELAY_GROUP, PROCESSOR_GROUP}}
    for user in (*policies.SERVICES, "minio"):
        grants = policies.broker(user, "mine.")
        assert grants
        for grant in grants:
            assert grant.name.removeprefix("mine.") in names[grant.resource]
            assert grant.operation in ("Read", "Write", "Create", "Describe")
            assert grant.operation != "Create" or user == "upgrade"


def test_only_who_upgrades_changes_tables() -> None:
    for service in policies.SERVICES:
        statement, *more = policies.database(service)
        granted = re.fullmatch(rf"GRANT ([A-Z, ]+) ON `image\\_search`\.\* TO '{service}'@'%';", statement)
        assert granted
        changes_tables = not set(granted[1].split(", ")) <= {"SELECT", "INSERT", "UPDATE", "DELETE"}
        assert changes_tables == (service == "upgrade")
        # The last use of a key, a job, a model. CREATE is what lets a right to one table be given before the table is there.
        rights = {"api_keys": "UPDATE", "jobs": "INSERT", "models": "UPDATE", "image_metadata": "INSERT, UPDATE"}
        more_rights = [f"GRANT CREATE, {right} ON `image_search`.`{table}` TO 'query'@'%';" for table, right in rights.items()]
        assert more == (more_rights if service == "query" else [])


def test_only_workers_change_vectors_and_only_who_upgrades_makes_collections() -> None:
    for service in policies.SERVICES:
        found = policies.vector_store(service)
        assert bool({"Insert", "Upsert", "Delete"} & set(found["Collection"])) == (service == "worker")
        assert ("CreateCollection" in found["Global"]) == (service == "upgrade")
        assert "DropCollection" not in found["Global"]


def test_every_file_of_policies_is_used() -> None:
    files = {str(path.relative_to(policies.FOLDER)) for path in policies.FOLDER.rglob("*") if path.is_file()}
    kinds = (("minio", "json"), ("kafka", "acl"), ("sql", "sql"), ("milvus", "json"))
    assert files == {f"{kind}/{service}.{ending}" for kind, ending in kinds for service in policies.SERVICES} | {
        "kafka/minio.acl"
    }
