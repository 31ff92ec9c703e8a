"""TLS to the database: asked for in its URL, checked against a CA, and never silently left out."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.engine import URL, make_url

from infra import metadata_store
from infra.errors import ConfigurationError, StoreUnavailable
from infra.local_stack import mariadb, ports
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.supervisor import Supervisor
from infra.metadata_store import upgrade_schema
from infra.metadata_store.engine import Database, parse_url
from infra.metadata_store.probe import probe
from infra.settings import CommonSettings, StackSettings
from tests.conftest import require_full_servers, unavailable

SECONDS = 10.0


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own CA, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@dataclass(frozen=True)
class TlsServers:
    """Two MariaDB servers: one takes encrypted connections only, the other knows no TLS."""

    encrypted: URL
    plain: URL
    ca: Path
    other_ca: Path

    def url(self, server: URL, ca: Path) -> str:
        return server.update_query_dict({"ssl_ca": str(ca)}).render_as_string(hide_password=False)


@pytest.fixture(scope="module")
async def tls(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TlsServers]:
    require_full_servers()
    if shutil.which("openssl") is None:
        unavailable("the program openssl is missing: it makes the certificates of these tests")
    found = mariadb.find()
    assert found is not None
    base = tmp_path_factory.mktemp("tls")
    (ca, key), (other_ca, _) = certificate(base, "server"), certificate(base, "other")
    options = {"encrypted": (f"--ssl-cert={ca}", f"--ssl-key={key}", "--require-secure-transport=ON"), "plain": ("--skip-ssl",)}
    urls: dict[str, URL] = {}
    stack = Supervisor(base, base / "processes.json")
    try:
        for (name, more), port in zip(options.items(), ports.find_free(2), strict=True):
            folder = StackFolder(base / name, "full")
            folder.make()
            credentials = Credentials.of(folder)
            settings = StackSettings.model_validate({"mariadb_port": port})
            await mariadb.prepare(folder.root, settings, credentials, found, folder.logs)
            address = mariadb.url(folder.root, settings, credentials)
            urls[name] = make_url(address)
            asked = TlsServers(urls[name], urls[name], ca, other_ca).url(urls[name], ca) if name == "encrypted" else address
            program = mariadb.program(folder.root, settings, credentials, found)
            ready = partial(probe, asked, timeout_seconds=SECONDS)
            await stack.start([replace(program, name=name, command=(*program.command, *more), ready=ready)])
        yield TlsServers(urls["encrypted"], urls["plain"], ca, other_ca)
    finally:
        await stack.stop()


async def test_upgrade_and_services_talk_to_the_server_encrypted(tls: TlsServers) -> None:
    url = tls.url(tls.encrypted, tls.ca)
    settings = CommonSettings.model_validate({"database_url": url})
    assert "upgraded" in await upgrade_schema(settings)
    store = await metadata_store.connect(settings)
    await store.check()
    await store.close()
    database = Database(parse_url(url), pool_size=1, timeout_seconds=SECONDS)
    status = await database.read(lambda connection: connection.execute(sqlalchemy.text("SHOW STATUS LIKE 'Ssl_cipher'")))
    assert status.one()[1].startswith("TLS_")
    await database.close()


async def test_a_certificate_of_another_ca_is_refused(tls: TlsServers) -> None:
    with pytest.raises(StoreUnavailable):
        await probe(tls.url(tls.encrypted, tls.other_ca), timeout_seconds=SECONDS)


async def test_a_certificate_for_another_host_is_refused(tls: TlsServers) -> None:
    with pytest.raises(StoreUnavailable):
        await probe(tls.url(tls.encrypted.set(host="localhost"), tls.ca), timeout_seconds=SECONDS)


async def test_a_server_that_wants_tls_refuses_who_does_not_speak_it(tls: TlsServers) -> None:
    with pytest.raises(StoreUnavailable):
        await probe(tls.encrypted.render_as_string(hide_password=False), timeout_seconds=SECONDS)


async def test_tls_that_was_asked_for_is_never_left_out(tls: TlsServers) -> None:
    """The drivers would go on without it, and so would whoever sits in between."""
    url = tls.url(tls.plain, tls.ca)
    with pytest.raises(ConfigurationError, match="does not offer TLS"):
        await probe(url, timeout_seconds=SECONDS)
    with pytest.raises(StoreUnavailable):
        await upgrade_schema(CommonSettings.model_validate({"database_url": url}))
