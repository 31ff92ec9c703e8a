"""The servers of each profile: what comes before their start, which ports they take, and how clients reach them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from infra.local_stack import kafka, kafka_jars, mariadb, milvus, minio, seaweedfs
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.program import Program
from infra.settings import StackSettings

EMBEDDED, FULL = "embedded", "full"
_DESCRIBED = {EMBEDDED: "SeaweedFS, Kafka and Milvus", FULL: "MinIO, Kafka, Milvus and MariaDB"}
_NOT_TAKEN = {EMBEDDED: mariadb.PORTS, FULL: seaweedfs.PORTS - minio.PORTS}

SERVICE_PORTS = frozenset({"query_port", "bridge_port", "processor_port"})


def described(profile: str) -> str:
    """The names of a profile's servers, for people."""
    return _DESCRIBED[profile]


def ports_taken(profile: str, settings: StackSettings) -> dict[str, int]:
    """The ports that a stack of this profile listens on, by the name of their setting."""
    more_workers = {f"processor_port + {more}": port for more, port in enumerate(settings.processor_ports()) if more}
    return {name: port for name, port in settings.ports().items() if name not in _NOT_TAKEN[profile]} | more_workers


def server_ports(profile: str, settings: StackSettings) -> dict[str, int]:
    return {name: port for name, port in settings.ports().items() if name not in _NOT_TAKEN[profile] | SERVICE_PORTS}


async def prepare(
    folder: StackFolder, settings: StackSettings, credentials: Credentials, say: Callable[[str], None]
) -> list[Program]:
    """Download, build, unpack and configure what is missing.

    Raises DownloadFailed and ProgramFailed, and ConfigurationError for a server that must be installed first.
    """
    # A thread cannot be cancelled, and the program does not end before its threads: they are told.
    given_up = threading.Event()
    try:
        jars, binaries, programs = await asyncio.gather(
            asyncio.to_thread(kafka_jars.fetch, settings.cache_dir, say, given_up),
            asyncio.to_thread(milvus.unpack, settings.cache_dir, say, given_up),
            prepare_own(folder, settings, credentials, say),
        )
    finally:
        given_up.set()
    milvus.prepare(folder.root, settings)
    await kafka.prepare(folder.root, settings, credentials, jars)
    return [
        *programs,
        kafka.program(folder.root, settings, jars),
        milvus.program(folder.root, settings, credentials, binaries),
    ]


async def prepare_own(
    folder: StackFolder, settings: StackSettings, credentials: Credentials, say: Callable[[str], None]
) -> list[Program]:
    """As `prepare`, for what this profile has and others have not: object store and database."""
    if folder.profile == FULL:
        return await _full(folder, settings, credentials, say)
    seaweedfs.prepare(folder.root, credentials)
    return [seaweedfs.program(folder.root, settings, credentials)]


async def _full(
    folder: StackFolder, settings: StackSettings, credentials: Credentials, say: Callable[[str], None]
) -> list[Program]:
    # First what may be refused in a second, then what takes minutes.
    database = await mariadb.programs(folder.logs, say)
    store = await minio.program_path(settings.cache_dir, folder.logs, say)
    minio.prepare(folder.root)
    await mariadb.prepare(folder.root, credentials, database, folder.logs)
    return [
        minio.program(folder.root, settings, credentials, store),
        mariadb.program(folder.root, settings, credentials, database),
    ]


def addresses(folder: StackFolder, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """Fields of the services' settings, by name, that make them use these servers and the data in this folder."""
    own = _full_addresses if folder.profile == FULL else _embedded_addresses
    return {
        "cache_dir": str(settings.cache_dir),
        "buckets": ",".join(settings.buckets),
        "s3_endpoint": f"http://127.0.0.1:{settings.s3_port}",
        "s3_access_key": credentials.s3_access_key,
        "s3_secret_key": credentials.s3_secret_key,
        "kafka_bootstrap": f"127.0.0.1:{settings.kafka_port}",
        "kafka_topic_prefix": settings.kafka_topic_prefix,
        "milvus_uri": f"http://127.0.0.1:{settings.milvus_port}",
        "milvus_token": f"{milvus.USER}:{credentials.milvus_password}",
        "processor_data_dir": str(folder.root / "worker"),
        **own(folder.root, settings, credentials),
    }


def _embedded_addresses(root: Path, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    return {
        "database_url": f"sqlite+aiosqlite:///{root / 'metadata.db'}",
        "follow": "seaweedfs",
        "seaweedfs_filer": f"127.0.0.1:{settings.filer_port}.{settings.filer_grpc_port}",
        "seaweedfs_weed": seaweedfs.weed_path(),
        "seaweedfs_config_dir": str(seaweedfs.config_dir(root)),
    }


def _full_addresses(root: Path, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    return {
        "database_url": mariadb.url(settings, credentials),
        "follow": "notifications",
        "notification_arns": ",".join(minio.ARNS),
    }
