"""What all tests share: real servers, started once a run and only when a test asks for them; no sockets in unit tests."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy import create_engine, make_url, text

from infra.errors import ImageSearchError
from infra.settings import CommonSettings, StackSettings

if TYPE_CHECKING:
    from infra.local_stack.supervisor import Supervisor

# No test asserts a time, and an example that a busy machine was slow at is no failure.
hypothesis_settings.register_profile(
    "no time-outs", hypothesis_settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("no time-outs")

UNIT_TESTS = Path(__file__).parent / "unit"

Settings = TypeVar("Settings", bound=CommonSettings)


@dataclass(frozen=True, slots=True)
class Servers:
    """SeaweedFS, Kafka and Milvus as they run for this session.

    `stack` is their supervisor: `kill(name)` is SIGKILL, after which it starts the server again; `wait_ready(name)` returns
    when that is done; `async with paused(name)` keeps one away. Names: seaweedfs, kafka, milvus.
    """

    settings: CommonSettings
    stack: Supervisor
    ports: StackSettings
    values: dict[str, str]
    """Fields of any service's settings that point at these servers."""


class FreshSettings(Protocol):
    """`fresh_settings(QuerySettings, max_limit=5)`: settings with a bucket, topics, collections and a database of their own.

    Nothing is created: neither bucket nor topics nor tables.
    """

    def __call__(self, kind: type[Settings], **changes: object) -> Settings: ...


def unavailable(reason: str) -> NoReturn:
    """Skip; on CI fail, because there a test that does not run is a test that does not pass."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def require_full_servers() -> None:
    """Building MinIO takes longer than a test may: `make test` does it first."""
    from infra.local_stack import mariadb, minio

    if minio.find(StackSettings().cache_dir) is None or mariadb.find() is None:
        unavailable("MinIO has to be built or MariaDB installed first: make full-servers")


@pytest.fixture(scope="session")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """The servers that `image-search up` would start, on free ports, under a temporary folder."""
    try:
        from infra.local_stack import ports
        from infra.local_stack import servers as local_servers
        from infra.local_stack.folder import Credentials, StackFolder
        from infra.local_stack.supervisor import Supervisor
    except ImportError as error:
        unavailable(f"the local servers are not installed: {error}")
    folder = StackFolder(tmp_path_factory.mktemp("servers"), "embedded")
    folder.make()
    names = list(StackSettings().ports())
    settings = StackSettings.model_validate(dict(zip(names, ports.find_free(len(names)), strict=True)))
    credentials = Credentials.of(folder)
    stack = Supervisor(folder.logs, folder.processes_file)
    try:
        try:
            await stack.start(await local_servers.prepare(folder, settings, credentials, print))
        except ImageSearchError as error:
            unavailable(f"the local servers cannot start here: {error}")
        values = local_servers.addresses(folder, settings, credentials)
        yield Servers(CommonSettings.model_validate(values), stack, settings, values)
    finally:
        await stack.stop()


@pytest.fixture(scope="session")
async def full_servers(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """MinIO and MariaDB beside the Kafka and Milvus of `servers`; `stack` has these two: minio, mariadb.

    MinIO's notifications come on the topic without a prefix.
    """
    require_full_servers()
    from infra.local_stack import ports
    from infra.local_stack import servers as local_servers
    from infra.local_stack.folder import Credentials, StackFolder
    from infra.local_stack.supervisor import Supervisor

    folder = StackFolder(tmp_path_factory.mktemp("full-servers"), "full")
    folder.make()
    s3_port, mariadb_port = ports.find_free(2)
    settings = servers.ports.model_copy(update={"s3_port": s3_port, "mariadb_port": mariadb_port})
    credentials = Credentials.of(folder)
    stack = Supervisor(folder.logs, folder.processes_file)
    try:
        await stack.start(await local_servers.prepare_own(folder, settings, credentials, print))
        shared = {"milvus_token": servers.values["milvus_token"]}
        values = {**local_servers.addresses(folder, settings, credentials), **shared}
        yield Servers(CommonSettings.model_validate(values), stack, settings, values)
    finally:
        await stack.stop()


def settings_on(servers: Servers, folder: Path) -> FreshSettings:
    numbers = itertools.count(1)

    def make(kind: type[Settings], **changes: object) -> Settings:
        name = f"t{secrets.token_hex(4)}{next(numbers)}"
        own = {
            "buckets": name,
            "kafka_topic_prefix": f"{name}.",
            "kafka_partitions": 2,
            "milvus_collection_prefix": f"{name}_",
            "database_url": _fresh_database(servers, folder, name),
            "processor_data_dir": str(folder / f"{name}-worker"),
        }
        return kind.model_validate({**servers.values, **own, **changes})

    return make


def _fresh_database(servers: Servers, folder: Path, name: str) -> str:
    """On SQLite a file, not made; on a server an empty database, because only its own administrators make one there."""
    url = make_url(servers.values["database_url"])
    if url.get_backend_name() == "sqlite":
        return f"sqlite+aiosqlite:///{folder / name}.db"
    engine = create_engine(url.set(drivername="mysql+pymysql"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE DATABASE {url.database}_{name}"))
    engine.dispose()
    return url.set(database=f"{url.database}_{name}").render_as_string(hide_password=False)


@pytest.fixture
def fresh_settings(servers: Servers, tmp_path: Path) -> FreshSettings:
    return settings_on(servers, tmp_path)


@pytest.fixture
def full_settings(full_servers: Servers, tmp_path: Path) -> FreshSettings:
    """As `fresh_settings`, on MinIO and MariaDB."""
    return settings_on(full_servers, tmp_path)


@pytest.fixture(scope="module")
def module_settings(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> FreshSettings:
    """As `fresh_settings`, for a deployment that all tests of a module share."""
    return settings_on(servers, tmp_path_factory.mktemp("deployment"))


@pytest.fixture(autouse=True)
def _no_sockets_in_unit_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A unit test that reaches for the network fails, and names the address. Pairs of sockets inside the process may be."""
    if UNIT_TESTS not in request.path.parents:
        yield
        return

    def refuse(self: socket.socket, address: object) -> NoReturn:
        raise AssertionError(f"a unit test opened a socket to {address}")

    for method in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, method, refuse)
    yield
