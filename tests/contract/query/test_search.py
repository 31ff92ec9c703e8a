"""Searching over HTTP: forms and bodies, every error code, hostile input, waiting for a put."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import FormData

from infra.errors import StoreRefused, StoreUnavailable
from infra.object_store.memory import Operation
from processors.decode_pool import Box
from processors.embedding.embedder import Pixels
from query_service.keys import SEARCHES
from schemas.api import ErrorCode
from schemas.events import ReasonCode
from schemas.identity import ObjectRef
from tests.filters import NASTY_KEYS
from tests.query_http import MAX_BYTES, Client, keys_of, refused, running
from tests.query_world import BUCKET, QueryWorld, decode, picture


def form(**fields: object) -> FormData:
    data = FormData()
    for name, value in fields.items():
        if isinstance(value, bytes):
            data.add_field(name, value, filename="a.jpg", content_type="image/jpeg")
        else:
            data.add_field(name, str(value))
    return data


@pytest.mark.parametrize("body", [form(file=picture(0)), form(image=picture(0)), picture(0)])
async def test_search_by_form_and_by_raw_body(world: QueryWorld, client: Client, body: FormData | bytes) -> None:
    await world.put("a b+ä%.jpg", 0)
    await world.put("far.jpg", 90)
    response = await client.post("/v1/search", data=body, params={"min_score": "50"})
    assert response.status == 200
    answer = await response.json()
    assert keys_of(answer) == ["a b+ä%.jpg"]
    assert answer["limit"] == 20
    assert answer["timing_ms"].keys() == {"decode", "embed", "search", "metadata"}
    content = await client.get(answer["hits"][0]["url"])
    assert await content.read() == picture(0)


async def test_parameters_as_form_fields(world: QueryWorld, client: Client) -> None:
    for number in range(5):
        await world.put(f"a/{number}", number)
    response = await client.post("/v1/search", data=form(limit=2, prefix="a/", file=picture(4)))
    answer = await response.json()
    assert (keys_of(answer), answer["limit"]) == (["a/4", "a/3"], 2)


async def test_a_filter_in_the_form_and_in_the_query(world: QueryWorld, client: Client) -> None:
    for number, key in enumerate(NASTY_KEYS):
        await world.put(key, number)
    for key in NASTY_KEYS[:-3]:
        only = json.dumps({"must": [{"field": "key", "match": {"value": key}}]})
        for sent in (
            client.post("/v1/search", data=form(file=picture(0), filter=only)),
            client.post("/v1/search", data=picture(0), params={"filter": only}),
            client.get(f"/v1/images/{ObjectRef(BUCKET, NASTY_KEYS[-1]).object_id.hex()}/similar", params={"filter": only}),
        ):
            assert keys_of(await (await sent).json()) == [key]
    none = json.dumps({"must": [{"field": "bucket", "match": {"value": BUCKET}}]})
    response = await client.post("/v1/search", data=form(file=picture(0), filter=none, bucket="elsewhere"))
    assert keys_of(await response.json()) == []


async def test_a_part_of_the_form_that_says_it_is_json(world: QueryWorld, client: Client) -> None:
    await world.put("a.jpg", 0)
    data = form(file=picture(0))
    large = json.dumps({"must": [{"field": "width", "range": {"gt": 40}}]})
    data.add_field("filter", large, content_type="application/json")
    assert keys_of(await (await client.post("/v1/search", data=data)).json()) == []


async def test_a_wrong_filter(client: Client) -> None:
    wrong = json.dumps({"must": [{"field": "widht", "range": {"gt": 40}}]})
    for sent in (
        client.post("/v1/search", params={"filter": wrong}),
        client.post("/v1/search", data=form(file=picture(0), filter=wrong)),
        client.get("/v1/images", params={"filter": wrong}),
    ):
        error = await refused(await sent, ErrorCode.INVALID_FILTER)
        assert error["details"]["parameters"][0]["at"] == "must.0"


async def test_a_parameter_in_form_and_query_is_refused(client: Client) -> None:
    response = await client.post("/v1/search?limit=3", data=form(file=picture(0), limit=2))
    await refused(response, ErrorCode.INVALID_REQUEST)


@pytest.mark.parametrize("limit", ["0", "501", "1001", "abc", "-1", "1.5"])
async def test_a_wrong_limit(client: Client, limit: str) -> None:
    for sent in (client.post("/v1/search", params={"limit": limit}, data=picture(0)), client.get(f"/v1/images?limit={limit}")):
        error = await refused(await sent, ErrorCode.INVALID_REQUEST)
        assert error["details"]["parameters"][0]["parameter"] == "limit"


async def test_no_picture_an_empty_one_and_text(client: Client) -> None:
    await refused(await client.post("/v1/search"), ErrorCode.MISSING_IMAGE)
    await refused(await client.post("/v1/search", data=form(limit=2, prefix="a")), ErrorCode.UNSUPPORTED_MEDIA_TYPE)
    multipart = FormData({"limit": "2"}, default_to_multipart=True)
    await refused(await client.post("/v1/search", data=multipart), ErrorCode.MISSING_IMAGE)
    await refused(await client.post("/v1/search", data=form(file=b"")), ErrorCode.EMPTY_OBJECT)
    await refused(await client.post("/v1/search", data=form(file=b"just text")), ErrorCode.NOT_AN_IMAGE)


async def test_a_form_that_is_none(client: Client) -> None:
    two = form(file=picture(0), image=picture(1))
    await refused(await client.post("/v1/search", data=two), ErrorCode.INVALID_BODY)
    for body in (b"no boundary in here", b"--x\r\n\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\nnameless\r\n--x--\r\n"):
        response = await client.post("/v1/search", data=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
        await refused(response, ErrorCode.INVALID_BODY)
    response = await client.post("/v1/search", data=b"x", headers={"Content-Type": "multipart/form-data"})
    await refused(response, ErrorCode.INVALID_BODY)
    many = FormData(default_to_multipart=True)
    for number in range(50):
        many.add_field(f"f{number}", "x")
    await refused(await client.post("/v1/search", data=many), ErrorCode.INVALID_BODY)
    await refused(await client.post("/v1/search", data=form(file=picture(0), colour="red")), ErrorCode.INVALID_REQUEST)
    await refused(await client.post("/v1/search", data=form(prefix="x" * 9000, file=picture(0))), ErrorCode.BODY_TOO_LARGE)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_of_another_kind(client: Client, content_type: str) -> None:
    response = await client.post("/v1/search", data=b"{}", headers={"Content-Type": content_type})
    await refused(response, ErrorCode.UNSUPPORTED_MEDIA_TYPE)


async def test_a_compressed_body(client: Client) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "image/jpeg"}
    response = await client.post("/v1/search", data=gzip.compress(picture(0)), headers=headers)
    await refused(response, ErrorCode.UNSUPPORTED_CONTENT_ENCODING)


async def test_a_body_that_is_too_large_announced_or_not(client: Client) -> None:
    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * (MAX_BYTES // 10)

    for body in (b"x" * (MAX_BYTES + 1), unannounced(), form(file=b"x" * (MAX_BYTES + 1)), form(file=b"x" * (8 * MAX_BYTES))):
        await refused(await client.post("/v1/search", data=body), ErrorCode.BODY_TOO_LARGE)


async def test_a_body_that_does_not_come(world: QueryWorld) -> None:
    async def dripping() -> AsyncIterator[bytes]:
        yield b"picture "
        await asyncio.sleep(30)

    async with running(world, body_timeout_seconds=0.1) as client:
        await refused(await client.post("/v1/search", data=dripping()), ErrorCode.BODY_TIMEOUT)


async def test_a_client_that_waits_to_be_told_to_go_on(world: QueryWorld, client: Client) -> None:
    await world.put("a.jpg", 0)
    response = await client.post("/v1/search", data=picture(0), expect100=True)
    assert keys_of(await response.json()) == ["a.jpg"]


async def test_too_many_searches(world: QueryWorld) -> None:
    gate, inside = asyncio.Event(), asyncio.Semaphore(0)

    async def slow(data: bytes, box: Box | None) -> Pixels:
        inside.release()
        await gate.wait()
        return await decode(data, box)

    world.decode = slow
    async with running(world, queries_at_once=1, queries_waiting=1) as client:
        sent = [asyncio.create_task(client.post("/v1/search", data=picture(0))) for _ in range(2)]
        await inside.acquire()
        while client.app[SEARCHES].inside < 2:
            await asyncio.sleep(0.01)
        response = await client.post("/v1/search", data=picture(0))
        await refused(response, ErrorCode.TOO_MANY_REQUESTS)
        assert response.headers["Retry-After"] == "1"
        gate.set()
        assert [(await task).status for task in sent] == [200, 200]


async def test_pictures_that_fill_the_memory(world: QueryWorld) -> None:
    gate, arrived = asyncio.Event(), asyncio.Event()

    async def held(data: bytes, box: Box | None) -> Pixels:
        arrived.set()
        await gate.wait()
        return await decode(data, box)

    world.decode = held
    async with running(world, max_object_bytes=10, body_bytes_at_once=10) as client:
        first = asyncio.create_task(client.post("/v1/search", data=picture(0)))
        await arrived.wait()
        await refused(await client.post("/v1/search", data=picture(0)), ErrorCode.TOO_MANY_REQUESTS)
        gate.set()
        assert (await first).status == 200
        assert (await client.post("/v1/search", data=picture(0))).status == 200


async def test_a_store_that_is_away(world: QueryWorld, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_arguments: object, **_more: object) -> None:
        raise StoreUnavailable("vector store", "StatusCode.UNAVAILABLE secret-host:19530")

    monkeypatch.setattr(world.vectors, "search", away)
    response = await client.post("/v1/search", data=picture(0))
    error = await refused(response, ErrorCode.STORE_UNAVAILABLE)
    assert error["details"] == {"store": "vector store"}
    assert "Retry-After" in response.headers
    assert "secret" not in json.dumps(error)


async def test_what_nobody_foresaw(world: QueryWorld, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_arguments: object, **_more: object) -> None:
        raise RuntimeError("/srv/secret.py")

    monkeypatch.setattr(world.vectors, "search", broken)
    error = await refused(await client.post("/v1/search", data=picture(0)), ErrorCode.INTERNAL_ERROR)
    assert "secret" not in json.dumps(error)


async def test_wait_for(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)
    object_id = row.object_id.hex()
    for token in (f"{object_id}:{row.etag}", f'{object_id}:"{row.etag}"', f"{'0' * 64}:deleted"):
        response = await client.post("/v1/search", params={"wait_for": token}, data=picture(0))
        assert keys_of(await response.json()) == ["a.jpg"]
    assert (await client.get(f"/v1/images/{object_id}", params={"wait_for": f"{object_id}:{row.etag}"})).status == 200


async def test_wait_for_what_does_not_come(world: QueryWorld, client: Client) -> None:
    token = f"{ObjectRef(BUCKET, 'later.jpg').object_id.hex()}:e1"
    error = await refused(await client.post("/v1/search", params={"wait_for": token}, data=picture(0)), ErrorCode.WAIT_TIMEOUT)
    assert error["details"] == {"wait_for": token, "state": None}


@pytest.mark.parametrize("token", ["x", "abc:def", f"{'0' * 63}:e", f"{'0' * 64}:", f"{'0' * 64}"])
async def test_a_wrong_token(client: Client, token: str) -> None:
    await refused(await client.post("/v1/search", params={"wait_for": token}, data=picture(0)), ErrorCode.INVALID_WAIT_FOR)


async def test_waiting_looks_into_the_bucket_and_says_when_it_may_not(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)

    async def denied(operation: Operation, _bucket: str, _key: str | None) -> None:
        raise StoreRefused(ReasonCode.ACCESS_DENIED, "AccessDenied AKIA")

    world.objects.before_call = denied
    response = await client.get(f"/v1/images/{row.object_id.hex()}", params={"wait_for": f"{row.object_id.hex()}:newer"})
    assert "AKIA" not in json.dumps(await refused(response, ErrorCode.STORE_REFUSED))
