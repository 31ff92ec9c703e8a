"""The servers of each profile: what comes before their start, which ports they take, and how clients reach them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from infra.errors import ConfigurationError
from infra.local_stack import kafka, kafka_access, kafka_jars, mariadb, milvus, minio, policies, seaweedfs
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.program import Program
from infra.object_store.accounts import add_accounts as add_store_accounts
from infra.settings import CommonSettings, StackSettings
from infra.vector_store.accounts import add_account as add_vector_account

ACCOUNTS_SECONDS = 30.0
EMBEDDED, FULL = "embedded", "full"
_DESCRIBED = {EMBEDDED: "SeaweedFS, Kafka and Milvus", FULL: "MinIO, Kafka, Milvus and MariaDB"}
_NOT_TAKEN = {EMBEDDED: mariadb.PORTS, FULL: seaweedfs.PORTS - minio.PORTS}

SERVICE_PORTS = frozenset({"query_port", "bridge_port", "processor_port"})


def described(profile: str) -> str:
    """The names of a profile's servers, for people."""
    return _DESCRIBED[profile]


def require_possible(profile: str, settings: StackSettings) -> None:
    """Raises ConfigurationError for what this profile cannot do."""
    if settings.stack_tls and profile != FULL:
        raise ConfigurationError("IMAGE_SEARCH_STACK_TLS is for --profile full: start that one, or set it to false")


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
        kafka.program(folder.root, settings, credentials, jars),
        milvus.program(folder.root, settings, credentials, binaries),
    ]


async def prepare_own(
    folder: StackFolder, settings: StackSettings, credentials: Credentials, say: Callable[[str], None]
) -> list[Program]:
    """As `prepare`, for what this profile has and others have not: object store and database."""
    certificates = Certificates.of(folder.root, settings)
    if certificates is not None:
        certificates.prepare()
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
    minio.prepare(folder.root, settings)
    await mariadb.prepare(folder.root, settings, credentials, database, folder.logs)
    return [
        minio.program(folder.root, settings, credentials, store),
        mariadb.program(folder.root, settings, credentials, database),
    ]


async def make_accounts(folder: StackFolder, settings: StackSettings, credentials: Credentials) -> None:
    """Of a stack with TLS, whose servers run: an account for each service, with what its policy says.

    The database makes its own at each start. Repeated, it adds what is missing. Raises StoreUnavailable.
    """
    certificates = Certificates.of(folder.root, settings)
    if certificates is None:
        return
    seconds = ACCOUNTS_SECONDS
    await kafka_access.grant(
        settings.kafka_port, credentials, certificates, prefix=settings.kafka_topic_prefix, seconds=seconds
    )
    passwords = {service: credentials.password_of(service) for service in policies.SERVICES}
    administrator = CommonSettings.model_validate(addresses(folder, settings, credentials))
    await add_store_accounts(administrator, passwords, folder.root / "minio" / "policies")
    for service, password in passwords.items():
        await add_vector_account(
            milvus.address(folder.root, settings),
            administrator.milvus_token.get_secret_value(),
            user=service,
            password=password,
            privileges=policies.vector_store(service),
            timeout_seconds=seconds,
        )


def service_accounts(folder: StackFolder, settings: StackSettings, credentials: Credentials) -> dict[str, dict[str, str]]:
    """For each service the fields of its settings that differ from `addresses`: who it is. None without TLS."""
    if not settings.stack_tls:
        return {service: {} for service in policies.SERVICES}
    return {service: _account(folder.root, settings, credentials, service) for service in policies.SERVICES}


def _account(root: Path, settings: StackSettings, credentials: Credentials, service: str) -> dict[str, str]:
    password = credentials.password_of(service)
    return {
        "s3_access_key": service,
        "s3_secret_key": password,
        "kafka_username": service,
        "kafka_password": password,
        "milvus_token": f"{service}:{password}",
        "database_url": mariadb.url(root, settings, credentials, service=service),
    }


def addresses(folder: StackFolder, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """Fields of the services' settings, by name, that make them use these servers and the data in this folder.

    Who uses them may do everything there.
    """
    own = _full_addresses if folder.profile == FULL else _embedded_addresses
    certificates = Certificates.of(folder.root, settings)
    ca = str(certificates.ca) if certificates else ""
    return {
        "cache_dir": str(settings.cache_dir),
        "buckets": ",".join(settings.buckets),
        "s3_endpoint": minio.endpoint(settings),
        "s3_ca_file": ca,
        "s3_access_key": credentials.s3_access_key,
        "s3_secret_key": credentials.s3_secret_key,
        "kafka_bootstrap": f"127.0.0.1:{settings.kafka_port}",
        "kafka_topic_prefix": settings.kafka_topic_prefix,
        # Given in either case: an earlier start may have been with the other.
        "kafka_security_protocol": "SASL_SSL" if certificates else "PLAINTEXT",
        "kafka_ca_file": ca,
        "kafka_sasl_mechanism": kafka_access.MECHANISM,
        "kafka_username": kafka_access.ADMIN if certificates else "",
        "kafka_password": credentials.kafka_password if certificates else "",
        "milvus_uri": milvus.address(folder.root, settings).uri,
        "milvus_ca_file": ca,
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
        "database_url": mariadb.url(root, settings, credentials),
        "follow": "notifications",
        "notification_arns": ",".join(minio.ARNS),
    }
