"""One trace through real servers and three processes, and what becomes of a process whose receiver of traces is away."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from infra.local_stack import ports
from infra.settings import ENV_PREFIX, ProcessorSettings
from schemas.topics import HEADER_TRACE_PARENT, OUTCOMES
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed, environment_of
from tests.pictures import jpeg
from tests.trace_receiver import receiving

PATIENCE_SECONDS = 120.0
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SENDS_TRACES = """
import time
from infra.settings import CommonSettings
from infra.tracing import begin, traces
with traces(CommonSettings(), "test"):
    for _ in range(5000):
        begin("span").end()
    began = time.monotonic()
print(time.monotonic() - began)
"""


@asynccontextmanager
async def _running(command: str, environment: Mapping[str, str], port: int) -> AsyncIterator[None]:
    """A service as its operator runs it, from when it is ready; stopped by SIGTERM behind the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "infra.cli", "--state-dir", "no-such-folder", command), env={**os.environ, **environment}
    )
    try:
        await _ready(port)
        yield
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), PATIENCE_SECONDS) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _ready(port: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{port}/healthz/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


async def _outcome_trace(deployment: Deployment, key: str) -> str:
    """The trace in the headers of the outcome of this key, once it is there."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for record in await deployment.records(OUTCOMES):
                if record.key == f"{deployment.bucket}/{key}".encode():
                    return record.headers[HEADER_TRACE_PARENT].split("-")[1]
            await asyncio.sleep(0.1)


async def test_one_trace_from_the_put_to_the_outcome_and_one_of_a_search(
    servers: Servers, fresh_settings: FreshSettings, tmp_path: Path
) -> None:
    with receiving() as receiver:
        settings = fresh_settings(ProcessorSettings, decode_workers=1, traces_endpoint=receiver.endpoint)
        bridge_port, query_port = ports.find_free(2)
        environment = environment_of(settings) | {
            f"{ENV_PREFIX}{name}": str(value)
            for name, value in {
                "BRIDGE_PORT": bridge_port,
                "QUERY_PORT": query_port,
                "API_KEYS": "off",
                "SEAWEEDFS_FILER": servers.values["seaweedfs_filer"],
                "SEAWEEDFS_WEED": servers.values["seaweedfs_weed"],
            }.items()
        }
        async with deployed(settings, tmp_path) as deployment:
            worker = deployment.worker()
            async with _running("bridge", environment, bridge_port), _running("serve", environment, query_port):
                await _ready(worker.port)
                await deployment.put("a.jpg", jpeg(1))
                trace_id = await _outcome_trace(deployment, "a.jpg")
                async with (
                    aiohttp.ClientSession(headers={HEADER_TRACE_PARENT: CALLER}) as session,
                    session.post(f"http://127.0.0.1:{query_port}/v1/search", data=jpeg(1)) as answer,
                ):
                    assert answer.status == 200, await answer.text()
                # The rest is sent when a process ends.
                assert await worker.stop() == 0

    (changed,) = (span for span in receiver.named("object changed", key="a.jpg") if span.trace_id == trace_id)
    assert (changed.service, changed.parent_id, changed.attributes["image_search.source"]) == ("bridge", "", "log")
    (worked,) = receiver.below(changed)
    assert (worked.service, worked.name) == ("worker", "work on object")
    assert worked.attributes["image_search.object_id"] == changed.attributes["image_search.object_id"]
    (batch,) = receiver.below(worked)
    steps = [span.name for span in receiver.below(batch)]
    assert {"4 read", "6 decode", "7 embed", "8 vectors", "9 rows", "10 outcomes"} <= set(steps)
    (searched,) = receiver.named("POST /v1/search")
    assert (searched.service, searched.trace_id) == ("query_service", CALLER.split("-")[1])
    assert [span.name for span in receiver.below(searched)] == ["decode", "embed", "search", "metadata"]


async def _ends_within(endpoint: str) -> float:
    """Seconds that a process with spans in hand takes to end, once it has nothing else to do."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SENDS_TRACES),
        env={**os.environ, f"{ENV_PREFIX}TRACES_ENDPOINT": endpoint},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return float(output)


async def test_a_receiver_that_is_away_or_silent_holds_up_no_end() -> None:
    """A bound far above what is promised (2 seconds), and far below what the library would wait: half a minute."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert await _ends_within(f"http://127.0.0.1:{port}") < 20
    assert await _ends_within(f"http://127.0.0.1:{port}") < 20, "nobody listens there any more"
