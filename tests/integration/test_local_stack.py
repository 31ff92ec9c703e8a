"""The local servers as `image-search up` runs them."""

from __future__ import annotations

import asyncio

import aiohttp
import psutil

from tests.conftest import Servers


async def test_a_killed_server_is_started_again(servers: Servers) -> None:
    before = servers.stack.running("seaweedfs").pid
    assert before is not None
    servers.stack.kill("seaweedfs")
    async with asyncio.timeout(30):
        await servers.stack.wait_ready("seaweedfs")
    after = servers.stack.running("seaweedfs")
    assert after.pid not in (None, before)
    assert after.restarts >= 1
    assert not psutil.pid_exists(before)


async def test_who_has_no_key_is_refused_everywhere(servers: Servers) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{servers.settings.s3_endpoint}/images/x.jpg", data=b"x") as answer:
            assert answer.status == 403
        async with session.delete(f"http://127.0.0.1:{servers.ports.filer_port}/buckets/") as answer:
            assert answer.status == 401
        async with session.get(f"{servers.settings.milvus_uri}/v1/vector/collections") as answer:
            assert answer.status == 401
        default = {"Authorization": "Bearer root:Milvus"}
        async with session.get(f"{servers.settings.milvus_uri}/v1/vector/collections", headers=default) as answer:
            assert answer.status == 401
