"""Promise: a worker that is cut off from the broker loses its partitions to the others, does no harm, and joins them again.

The fault bites: nothing passes between the worker and the broker for longer than its session, seen at the proxy between them
and at the group, which has one member left.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.local_stack import kafka, kafka_jars, ports
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.supervisor import Supervisor
from infra.settings import ProcessorSettings
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed, until
from tests.failpoints import Gate, hold_after
from tests.numbered import Numbered
from tests.proxy import Proxy

OLD, NEW = 40, 60
SESSION_SECONDS = 6.0
PATIENT_SECONDS = 60.0
"""The commit that is on its way when the network fails is waited for, and so its refusal is seen."""


@dataclass(frozen=True, slots=True)
class ProxiedKafka:
    address: str
    proxy: Proxy

    @property
    def behind_proxy(self) -> str:
        return f"127.0.0.1:{self.proxy.port}"


@pytest.fixture
async def broker(servers: Servers, tmp_path: Path) -> AsyncIterator[ProxiedKafka]:
    """A broker with two listeners. Clients go where a listener says that it is, so one of them names the proxy's address."""
    folder = StackFolder(tmp_path / "kafka", "embedded")
    folder.make()
    port, controller_port, proxied_port = ports.find_free(3)
    settings = servers.ports.model_copy(update={"kafka_port": port, "kafka_controller_port": controller_port})
    jars = await asyncio.to_thread(kafka_jars.fetch, settings.cache_dir, print, threading.Event())
    credentials = Credentials.of(folder)
    await kafka.prepare(folder.root, settings, credentials, jars)
    stack = Supervisor(folder.logs, folder.processes_file)
    async with Proxy.to("127.0.0.1", proxied_port) as proxy:
        _add_listener(folder.root / "kafka" / "server.properties", proxied_port, f"127.0.0.1:{proxy.port}")
        try:
            await stack.start([kafka.program(folder.root, settings, credentials, jars)])
            yield ProxiedKafka(f"127.0.0.1:{port}", proxy)
        finally:
            await stack.stop()


def _add_listener(file: Path, port: int, advertised: str) -> None:
    properties = dict(line.split("=", 1) for line in file.read_text().splitlines())
    properties["listeners"] += f",PROXIED://127.0.0.1:{port}"
    properties["advertised.listeners"] += f",PROXIED://{advertised}"
    properties["listener.security.protocol.map"] += ",PROXIED:PLAINTEXT"
    properties["inter.broker.listener.name"] = "PLAINTEXT"
    file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


@pytest.fixture
async def deployment(fresh_settings: FreshSettings, broker: ProxiedKafka, tmp_path: Path) -> AsyncIterator[Deployment]:
    settings = fresh_settings(
        ProcessorSettings,
        kafka_bootstrap=broker.address,
        kafka_partitions=4,
        session_timeout_seconds=SESSION_SECONDS,
        decode_workers=1,
        batch_size=4,
        queue_events=8,
    )
    async with deployed(settings, tmp_path) as made:
        yield made


async def test_one_of_two_workers_is_cut_off_for_longer_than_its_session(
    deployment: Deployment, broker: ProxiedKafka, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    gate.close()
    cut_off = deployment.worker(
        hold_after(10, gate), kafka_bootstrap=(broker.behind_proxy,), kafka_timeout_seconds=PATIENT_SECONDS
    )
    other = deployment.worker()
    await until(lambda: deployment.is_shared_by(2))
    old, new = Numbered(deployment, OLD, folder="old"), Numbered(deployment, NEW, folder="new", first_seed=1000)
    await deployment.send(await old.put())
    await gate.reached()
    broker.proxy.stall()
    gate.open()  # what it acknowledges from here on, it cannot commit
    await deployment.send([*await new.put(), *await old.change()])
    await deployment.settle()  # only possible when the group has given all partitions to the other
    assert await deployment.is_shared_by(1)
    assert broker.proxy.stalled > 0

    broker.proxy.go_on()
    await until(lambda: cut_off.says("OffsetCommit failed"))
    await until(lambda: deployment.is_shared_by(2))
    assert cut_off.process.poll() is None, deployment.last_lines()
    await deployment.settle()  # a commit that was late has taken nothing back
    await _assert_twice_at_most_under_one_id(deployment)
    await old.assert_as_the_bucket_says()
    await new.assert_as_the_bucket_says()

    other.kill()
    await deployment.send(await new.change())
    await deployment.settle()
    assert await cut_off.stop() == 0
    await new.assert_as_the_bucket_says()


async def _assert_twice_at_most_under_one_id(deployment: Deployment) -> None:
    """What was done twice is told twice, and a reader can tell: it is the same outcome."""
    told = {outcome.id: (outcome.data.key, outcome.type) for outcome in await deployment.outcomes()}
    assert set(Counter(told.values()).values()) == {1}
