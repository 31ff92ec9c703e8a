"""Those who mean ill: addresses where a picture should be, bodies that never end, bodies that grow when unpacked."""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import AsyncExitStack

import pytest

from query_service.keys import SEARCHES
from schemas.api import ErrorCode
from tests.query_http import MAX_BYTES, Client, refused, running
from tests.query_world import QueryWorld, picture

ADDRESSES = ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "localhost"]


@pytest.mark.parametrize("host", ADDRESSES)
async def test_an_address_is_not_fetched(client: Client, host: str) -> None:
    visitors: list[object] = []
    listener = await asyncio.start_server(lambda _reader, writer: visitors.append(writer), "127.0.0.1", 0)
    async with listener:
        url = f"http://{host}:{listener.sockets[0].getsockname()[1]}/picture.jpg"
        as_json = await client.post("/v1/search", data=json.dumps({"url": url}), headers={"Content-Type": "application/json"})
        await refused(as_json, ErrorCode.INVALID_REQUEST)
        await refused(await client.post("/v1/search", params={"url": url}, data=picture(1)), ErrorCode.INVALID_REQUEST)
        await refused(await client.post("/v1/search", data={"url": url}), ErrorCode.UNSUPPORTED_MEDIA_TYPE)
        assert not visitors


async def test_slow_senders_are_told_off_and_keep_nobody_waiting(world: QueryWorld) -> None:
    await world.put("a.jpg", 0)
    async with running(world, body_timeout_seconds=1, queries_waiting=200) as client, AsyncExitStack() as stack:
        readers = []
        for _ in range(200):
            reader, writer = await asyncio.open_connection(client.host, client.port)
            stack.callback(writer.close)
            writer.write(
                b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: 50\r\n\r\nx"
            )
            readers.append(reader)
        async with asyncio.timeout(30):
            while not client.app[SEARCHES].inside:
                await asyncio.sleep(0.01)
            found = await client.post("/v1/search", data=picture(0), headers={"Content-Type": "image/jpeg"})
            assert found.status == 200
            answers = await asyncio.gather(*(reader.read() for reader in readers))
        assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
        assert client.app[SEARCHES].inside == 0


async def test_a_form_without_an_end_is_cut_off_at_the_limit(client: Client) -> None:
    sent = 0

    async def endless() -> object:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while True:
            sent += 64 * 1024
            yield bytes(64 * 1024)

    response = await client.post("/v1/search", data=endless(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    await refused(response, ErrorCode.BODY_TOO_LARGE)
    assert sent < 100 * MAX_BYTES


async def test_a_body_that_grows_when_unpacked_is_refused(client: Client) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    headers = {"Content-Type": "image/jpeg", "Content-Encoding": "gzip"}
    await refused(await client.post("/v1/search", data=bomb, headers=headers), ErrorCode.UNSUPPORTED_CONTENT_ENCODING)


async def test_nested_json_is_refused_by_its_depth(client: Client) -> None:
    deep = '{"must":[' * 400 + "{}" + "]}" * 400
    assert (await client.get("/v1/images", params={"filter": deep})).status == 400
