"""The servers of the embedded profile: what comes before their start, and how clients reach them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from infra.local_stack import kafka, kafka_jars, milvus, seaweedfs
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.program import Program
from infra.settings import StackSettings

SERVICE_PORTS = frozenset({"query_port", "bridge_port", "processor_port"})


def server_ports(settings: StackSettings) -> dict[str, int]:
    return {name: port for name, port in settings.ports().items() if name not in SERVICE_PORTS}


async def prepare(
    folder: StackFolder, settings: StackSettings, credentials: Credentials, say: Callable[[str], None]
) -> list[Program]:
    """Download, unpack and configure what is missing. Raises DownloadFailed and ProgramFailed."""
    # A thread cannot be cancelled, and the program does not end before its threads: they are told.
    given_up = threading.Event()
    try:
        jars, binaries = await asyncio.gather(
            asyncio.to_thread(kafka_jars.fetch, settings.cache_dir, say, given_up),
            asyncio.to_thread(milvus.unpack, settings.cache_dir, say, given_up),
        )
    finally:
        given_up.set()
    seaweedfs.prepare(folder.root, credentials)
    milvus.prepare(folder.root, settings)
    await kafka.prepare(folder.root, settings, credentials, jars)
    return [
        seaweedfs.program(folder.root, settings, credentials),
        kafka.program(folder.root, settings, jars),
        milvus.program(folder.root, settings, credentials, binaries),
    ]


def addresses(root: Path, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """Fields of the services' settings, by name, that make them use these servers and the data in this folder."""
    return {
        "cache_dir": str(settings.cache_dir),
        "buckets": ",".join(settings.buckets),
        "s3_endpoint": f"http://127.0.0.1:{settings.s3_port}",
        "s3_access_key": credentials.s3_access_key,
        "s3_secret_key": credentials.s3_secret_key,
        "kafka_bootstrap": f"127.0.0.1:{settings.kafka_port}",
        "milvus_uri": f"http://127.0.0.1:{settings.milvus_port}",
        "milvus_token": f"{milvus.USER}:{credentials.milvus_password}",
        "database_url": f"sqlite+aiosqlite:///{root / 'metadata.db'}",
        "follow": "seaweedfs",
        "seaweedfs_filer": f"127.0.0.1:{settings.filer_port}.{settings.filer_grpc_port}",
        "seaweedfs_weed": seaweedfs.weed_path(),
        "seaweedfs_config_dir": str(seaweedfs.config_dir(root)),
        "processor_data_dir": str(root / "worker"),
    }
