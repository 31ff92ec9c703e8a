"""SeaweedFS: S3, filer, master and volumes in one process, all on loopback."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import aiohttp

from infra.errors import ConfigurationError
from infra.local_stack.folder import Credentials, write_private
from infra.local_stack.program import NotReady, Program
from infra.settings import StackSettings

# Small volumes, so that deleted pictures give their space back soon, and so that a bucket's first ones cost little.
VOLUME_MIB = 128
PORTS = frozenset(
    f"{part}_port"
    for part in (
        "s3",
        "s3_grpc",
        "filer",
        "filer_grpc",
        "master",
        "master_grpc",
        "volume",
        "volume_grpc",
        "admin",
        "admin_grpc",
    )
)


def weed_path() -> str:
    """Where the wheel put the `weed` program: beside this Python, which need not be on PATH."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ConfigurationError("the program `weed` is missing: pip install 'image-search[local]'")
    return found


def config_dir(root: Path) -> Path:
    return root / "seaweedfs" / "config"


def prepare(root: Path, credentials: Credentials) -> None:
    """Make the folders and the filer's keys. Without keys anybody on this machine could delete pictures over its HTTP port."""
    (root / "seaweedfs" / "data").mkdir(parents=True, exist_ok=True)
    config_dir(root).mkdir(exist_ok=True)
    write_private(
        config_dir(root) / "security.toml",
        f'[jwt.filer_signing]\nkey = "{credentials.filer_write_key}"\n\n'
        f'[jwt.filer_signing.read]\nkey = "{credentials.filer_read_key}"\n',
    )


def program(root: Path, settings: StackSettings, credentials: Credentials) -> Program:
    folder = root / "seaweedfs"
    return Program(
        name="seaweedfs",
        command=(
            weed_path(),
            f"-config_dir={config_dir(root)}",
            "-logtostderr=true",
            "mini",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            # A bucket that is missing is a fault to be told, not a wish for a new bucket.
            "-s3.autoCreateBucket=false",
            f"-master.volumeSizeLimitMB={VOLUME_MIB}",
            f"-volume.max={settings.object_store_gib * 1024 // VOLUME_MIB}",
            f"-s3.port={settings.s3_port}",
            f"-s3.port.grpc={settings.s3_grpc_port}",
            f"-filer.port={settings.filer_port}",
            f"-filer.port.grpc={settings.filer_grpc_port}",
            f"-master.port={settings.master_port}",
            f"-master.port.grpc={settings.master_grpc_port}",
            f"-volume.port={settings.volume_port}",
            f"-volume.port.grpc={settings.volume_grpc_port}",
            f"-admin.port={settings.admin_port}",
            f"-admin.port.grpc={settings.admin_grpc_port}",
        ),
        working_dir=folder,
        environment={"AWS_ACCESS_KEY_ID": credentials.s3_access_key, "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key},
        ready=lambda: _ready(settings.s3_port),
        start_seconds=settings.server_start_seconds,
    )


async def _ready(s3_port: int) -> None:
    """S3 answers, and refuses who has no key: with no credentials loaded it would take anonymous writes."""
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{s3_port}/") as answer:
            status = answer.status
    except aiohttp.ClientError as error:
        raise NotReady(f"S3 does not answer: {type(error).__name__}") from None
    if status != 403:
        raise NotReady(f"S3 answers {status} to a request without a key, not 403")
