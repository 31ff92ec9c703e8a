"""A MinIO of a test's own beside the shared Kafka: one that may be killed, filled up or cut off without harm to other tests."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from infra.local_stack import minio, ports
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.supervisor import Supervisor
from tests.conftest import Servers, require_full_servers


@dataclass(frozen=True, slots=True)
class OwnMinio:
    """`values`: fields of any service's settings that point at it. Its topics are its own, too."""

    stack: Supervisor
    queue: Path
    values: dict[str, str]

    def stored_events(self) -> int:
        """Events that wait on its disk for Kafka."""
        return sum(1 for _ in self.queue.rglob("*.event"))

    def kill(self) -> None:
        """By SIGKILL; it is started again."""
        self.stack.kill("minio")

    async def wait_ready(self) -> None:
        await self.stack.wait_ready("minio")


@asynccontextmanager
async def own_minio(servers: Servers, state_dir: Path, **environment: str) -> AsyncIterator[OwnMinio]:
    """`environment`: variables of MinIO besides those of the local stack."""
    require_full_servers()
    folder = StackFolder(state_dir, "full")
    folder.make()
    prefix = f"t{secrets.token_hex(4)}."
    settings = servers.ports.model_copy(update={"s3_port": ports.find_free(1)[0], "kafka_topic_prefix": prefix})
    credentials = Credentials.of(folder)
    path = await minio.program_path(settings.cache_dir, folder.logs, print)
    minio.prepare(folder.root, settings)
    program = minio.program(folder.root, settings, credentials, path)
    stack = Supervisor(folder.logs, folder.processes_file)
    try:
        await stack.start([replace(program, environment={**program.environment, **environment})])
        values = {
            "s3_endpoint": f"http://127.0.0.1:{settings.s3_port}",
            "s3_access_key": credentials.s3_access_key,
            "s3_secret_key": credentials.s3_secret_key,
            "kafka_topic_prefix": prefix,
            "follow": "notifications",
            "notification_arns": ",".join(minio.ARNS),
        }
        yield OwnMinio(stack, folder.root / "minio" / "queue", values)
    finally:
        await stack.stop()
