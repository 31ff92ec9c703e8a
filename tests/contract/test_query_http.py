"""The query service over HTTP on loopback, its stores being the twins: every route, every error code, hostile input."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request
from prometheus_client import REGISTRY

from infra.errors import ConfigurationError, StoreRefused, StoreUnavailable
from infra.kafka.memory import Operation as BrokerOperation
from infra.object_store.memory import Operation
from infra.settings import QuerySettings
from processors.embedding.embedder import Pixels
from query_service.app import init_app
from query_service.keys import SEARCHES
from query_service.sse import Message, Parser
from schemas.api import ErrorCode
from schemas.events import OutcomeType, ReasonCode
from schemas.identity import ModelFingerprint, ObjectRef
from schemas.tables import RowState
from schemas.topics import OUTCOMES, Topic
from tests.query_world import BUCKET, QueryWorld, Server, decode, picture

MAX_BYTES = 100_000

Client = TestClient[Request, Application]


def settings(**changes: object) -> QuerySettings:
    defaults = {
        "max_object_bytes": MAX_BYTES,
        "max_limit": 500,
        "event_heartbeat_seconds": 0.05,
        "wait_timeout_seconds": 0.2,
        "body_timeout_seconds": 5,
    }
    return QuerySettings.model_validate({**defaults, **changes})


@asynccontextmanager
async def running(world: QueryWorld, **changes: object) -> AsyncIterator[Client]:
    async with TestClient(Server(init_app(settings(**changes), world.resources()))) as client:
        yield client


@pytest.fixture
async def world() -> QueryWorld:
    return await QueryWorld().start()


@pytest.fixture
async def client(world: QueryWorld) -> AsyncIterator[Client]:
    async with running(world) as client:
        yield client


async def refused(response: aiohttp.ClientResponse, code: ErrorCode) -> dict[str, Any]:
    """The error of an answer, after checking that it has the one shape, the code's status, and the request's id."""
    body = await response.json()
    assert body.keys() == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"code", "message", "details", "request_id"}
    assert (error["code"], response.status) == (code, code.status)
    assert error["request_id"] == response.headers["X-Request-Id"]
    assert error["message"].endswith(".")
    assert "hex()" not in error["message"]
    return error


def keys_of(answer: dict[str, Any]) -> list[str]:
    return [hit["key"] for hit in answer["hits"]]


def form(**fields: object) -> FormData:
    data = FormData()
    for name, value in fields.items():
        if isinstance(value, bytes):
            data.add_field(name, value, filename="a.jpg", content_type="image/jpeg")
        else:
            data.add_field(name, str(value))
    return data


# -- search ------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
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

    async def slow(data: bytes) -> Pixels:
        inside.release()
        await gate.wait()
        return await decode(data)

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
    async with running(world, body_bytes_at_once=5) as client:
        await refused(await client.post("/v1/search", data=picture(0)), ErrorCode.TOO_MANY_REQUESTS)


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


# -- wait_for ----------------------------------------------------------------------------------------------------------
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


# -- images ------------------------------------------------------------------------------------------------------------
async def test_pages_of_images_have_each_once(world: QueryWorld, client: Client) -> None:
    names = [f"{number:02}.jpg" for number in range(7)]
    for name in reversed(names):
        await world.put(name, 0)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        response = await client.get("/v1/images", params={"limit": "3", **({"cursor": cursor} if cursor else {})})
        page = await response.json()
        seen += [image["key"] for image in page["images"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == names


async def test_images_by_state_bucket_and_prefix(world: QueryWorld, client: Client) -> None:
    await world.put("a/1", 0)
    await world.put("b/1", 0)
    await world.put("a/2", 0, bucket="other")
    await world.set_row(ObjectRef(BUCKET, "a/bad"), b"", state=RowState.FAILED, reason=ReasonCode.EMPTY_OBJECT)
    await world.set_row(ObjectRef(BUCKET, "a/gone"), b"", state=RowState.DELETED)

    async def listed(**parameters: str) -> list[tuple[str, str, str]]:
        images = (await (await client.get("/v1/images", params=parameters)).json())["images"]
        return [(image["bucket"], image["key"], image["state"]) for image in images]

    assert await listed(bucket=BUCKET, prefix="a/") == [(BUCKET, "a/1", "indexed"), (BUCKET, "a/bad", "failed")]
    assert await listed(state="failed") == [(BUCKET, "a/bad", "failed")]
    assert await listed(state="deleted") == [(BUCKET, "a/gone", "deleted")]
    assert await listed(bucket="other") == [("other", "a/2", "indexed")]


async def test_one_image(world: QueryWorld, client: Client) -> None:
    row = await world.put("日本.jpg", 3)
    image = await (await client.get(f"/v1/images/{row.object_id.hex()}")).json()
    assert (image["key"], image["state"], image["etag"]) == ("日本.jpg", "indexed", row.etag)
    assert image["put_time"] == "2023-11-14T22:13:20.123456Z"


async def test_ids_that_are_none_and_images_that_are_not_there(world: QueryWorld, client: Client) -> None:
    deleted = await world.set_row(ObjectRef(BUCKET, "gone"), b"", state=RowState.DELETED)
    for suffix in ("", "/similar", "/content"):
        await refused(await client.get(f"/v1/images/nonsense{suffix}"), ErrorCode.INVALID_ID)
        await refused(await client.get(f"/v1/images/{'0' * 63}g{suffix}"), ErrorCode.INVALID_ID)
        await refused(await client.get(f"/v1/images/{'0' * 64}{suffix}"), ErrorCode.IMAGE_NOT_FOUND)
        await refused(await client.get(f"/v1/images/{deleted.object_id.hex()}{suffix}"), ErrorCode.IMAGE_NOT_FOUND)


async def test_similar(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)
    await world.put("b.jpg", 10)
    response = await client.get(f"/v1/images/{row.object_id.hex()}/similar", params={"limit": "5"})
    assert keys_of(await response.json()) == ["b.jpg"]
    failed = await world.set_row(ObjectRef(BUCKET, "bad"), b"", state=RowState.FAILED, reason=ReasonCode.EMPTY_OBJECT)
    error = await refused(await client.get(f"/v1/images/{failed.object_id.hex()}/similar"), ErrorCode.IMAGE_NOT_INDEXED)
    assert error["details"] == {"state": "failed", "reason": "EMPTY_OBJECT"}


async def test_content_is_safe_to_open(world: QueryWorld, client: Client) -> None:
    row = await world.put('dir/ä "x".jpg', 0)
    # What the bucket says of an object is what its writer said.
    await world.objects.put(row.ref, picture(0), "text/html")
    response = await client.get(f"/v1/images/{row.object_id.hex()}/content")
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    assert response.headers["Content-Disposition"] == "inline; filename*=UTF-8''%C3%A4%20%22x%22.jpg"
    assert response.headers["Content-Length"] == str(len(picture(0)))
    etag = response.headers["ETag"]
    again = await client.get(f"/v1/images/{row.object_id.hex()}/content", headers={"If-None-Match": etag})
    assert (again.status, await again.read()) == (304, b"")


async def test_content_that_is_no_picture_is_an_attachment(world: QueryWorld, client: Client) -> None:
    ref = ObjectRef(BUCKET, "page.html")
    await world.objects.put(ref, b"<script>", "text/html")
    await world.set_row(ref, b"<script>", state=RowState.FAILED, reason=ReasonCode.NOT_AN_IMAGE)
    response = await client.get(f"/v1/images/{ref.object_id.hex()}/content")
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.headers["Content-Disposition"].startswith("attachment")


async def test_content_that_left_the_bucket(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)
    await world.objects.delete(row.ref)
    await refused(await client.get(f"/v1/images/{row.object_id.hex()}/content"), ErrorCode.CONTENT_NOT_FOUND)


# -- events ------------------------------------------------------------------------------------------------------------
async def read_events(response: aiohttp.ClientResponse, until: int | None = None) -> tuple[list[Message], Parser]:
    """The messages of a stream up to its end, or up to this many."""
    parser, messages = Parser(), []
    async for line in response.content:
        message = parser.feed(line.decode().rstrip("\n"))
        if message is not None:
            messages.append(message)
            if len(messages) == until:
                break
    return messages, parser


def event_ids(messages: list[Message]) -> list[str]:
    return [json.loads(message.data)["id"] for message in messages]


async def test_replay_in_parts_gives_each_event_once_and_in_order_by_object(world: QueryWorld, client: Client) -> None:
    sent = [(await world.publish(f"{number % 4}.jpg", generation=number + 1)) for number in range(30)]
    seen: list[Message] = []
    headers: dict[str, str] = {}
    while len(seen) < len(sent):
        async with client.get("/v1/events?cursor=earliest&follow=false", headers=headers) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            messages, _ = await read_events(response, until=7)
        assert messages
        seen += messages
        # As a browser does: the same address again, and the last id in a header.
        headers = {"Last-Event-ID": seen[-1].last_id}
    assert sorted(event_ids(seen)) == sorted(event.id for event in sent)
    for key in range(4):
        generations = [
            data["generation"] for message in seen if (data := json.loads(message.data)["data"])["key"] == f"{key}.jpg"
        ]
        assert generations == sorted(generations)


async def test_live_events_and_heartbeats(world: QueryWorld, client: Client) -> None:
    await world.publish("before.jpg")
    async with client.get("/v1/events") as response:
        lines = [(await response.content.readline()).decode().strip() for _ in range(6)]
        assert lines[0].startswith("retry: ")
        assert lines[1].startswith("id: ")
        assert ": heartbeat" in lines
        event = await world.publish("now.jpg")
        [message], _ = await read_events(response, until=1)
        assert event_ids([message]) == [event.id]


async def test_events_by_type_bucket_and_prefix(world: QueryWorld, client: Client) -> None:
    await world.publish("a/1")
    failed = await world.publish("a/2", kind=OutcomeType.FAILED)
    await world.publish("a/3", kind=OutcomeType.FAILED, bucket="other")
    parameters = {"cursor": "earliest", "follow": "false", "type": "failed,deleted", "bucket": BUCKET, "prefix": "a/"}
    async with client.get("/v1/events", params=parameters) as response:
        messages, parser = await read_events(response)
    assert event_ids(messages) == [failed.id]
    async with client.get("/v1/events", params={"cursor": parser.last_id, "follow": "false"}) as response:
        assert (await read_events(response))[0] == []


async def test_cursors_that_are_none_or_gone(world: QueryWorld, client: Client) -> None:
    await refused(await client.get("/v1/events?cursor=nonsense"), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/events", headers={"Last-Event-ID": "nonsense"}), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/images?cursor=nonsense"), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/events?type=exploded"), ErrorCode.INVALID_REQUEST)
    for generation in range(1, 4):
        await world.publish("a.jpg", generation)
    async with client.get("/v1/events?cursor=earliest&follow=false") as response:
        [first, *_], _ = await read_events(response)
    [partition] = {record.partition for record in world.broker.records(OUTCOMES)}
    world.broker.remove_before(OUTCOMES, partition, 2)
    await refused(await client.get("/v1/events", params={"cursor": first.last_id}), ErrorCode.CURSOR_EXPIRED)


async def test_readers_are_bounded_and_one_that_leaves_makes_room(world: QueryWorld) -> None:
    async with running(world, event_readers=1) as client:
        async with client.get("/v1/events") as response:
            await response.content.readline()
            second = await client.get("/v1/events")
            await refused(second, ErrorCode.TOO_MANY_READERS)
            assert "Retry-After" in second.headers
            response.close()
        async with asyncio.timeout(5):
            while (await client.get("/v1/events?follow=false")).status != 200:
                await asyncio.sleep(0.02)


async def test_a_slow_reader_makes_nothing_grow(world: QueryWorld, client: Client) -> None:
    taken: list[BrokerOperation] = []

    async def count(operation: BrokerOperation, _topic: Topic | None) -> None:
        if operation is BrokerOperation.READ:
            taken.append(operation)

    for number in range(20_000):
        await world.publish(f"{'x' * 500}{number % 50}", number + 1)
    world.broker.before_call = count
    async with client.get("/v1/events?cursor=earliest", read_bufsize=1024) as response:
        await response.content.readline()
        before = -1
        while len(taken) != before:
            before = len(taken)
            await asyncio.sleep(0.3)
        # 40 lists of 500 events are there; what was taken is what fits the sockets between us.
        assert len(taken) < 30
        messages, _ = await read_events(response, until=20_000)
    assert len(set(event_ids(messages))) == 20_000


async def test_a_broker_that_fails_does_not_look_like_the_end(world: QueryWorld, client: Client) -> None:
    await world.publish("a.jpg")
    reads = 0

    async def fail_later(operation: BrokerOperation, _topic: Topic | None) -> None:
        nonlocal reads
        reads += operation is BrokerOperation.READ
        if reads > 1:
            raise StoreUnavailable("broker", "gone")

    world.broker.before_call = fail_later
    async with client.get("/v1/events?cursor=earliest") as response:
        with pytest.raises(aiohttp.ClientError):
            await read_events(response)


async def test_streams_end_when_the_service_stops(world: QueryWorld) -> None:
    async with running(world) as client:
        response = await client.get("/v1/events")
        await response.content.readline()
        async with asyncio.timeout(5):
            await client.server.close()


# -- operations --------------------------------------------------------------------------------------------------------
async def test_status(world: QueryWorld, client: Client) -> None:
    await world.put("a.jpg", 0)
    await world.set_row(ObjectRef(BUCKET, "bad"), b"", state=RowState.FAILED)
    status = await (await client.get("/v1/status")).json()
    assert status["images"] == {"indexed": 1, "failed": 1, "ignored": 0, "deleted": 0}
    assert status["model"]["name"] == "angles"
    assert status["lag"]["objects"] == {"pending": 0, "partitions": 4}
    assert status["freshness"]["reason"] is None
    assert status["freshness"]["indexed_through"].startswith("2023-11-14T22:13:19.6")


async def test_health_by_component(world: QueryWorld, client: Client) -> None:
    assert (await client.get("/healthz/live")).status == 200
    response = await client.get("/healthz/ready")
    names = ["object_store", "metadata_store", "vector_store", "broker", "model"]
    assert await response.json() == {"ready": True, "components": dict.fromkeys(names, "ok")}

    async def down(_operation: BrokerOperation, _topic: Topic | None) -> None:
        raise StoreUnavailable("broker", "secret-host refused")

    world.broker.before_call = down
    response = await client.get("/healthz/ready")
    body = await response.json()
    assert (response.status, body["ready"]) == (503, False)
    assert body["components"]["broker"] == "StoreUnavailable"
    assert body["components"]["metadata_store"] == "ok"


async def test_metrics_name_routes_by_their_pattern(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)
    await client.get(f"/v1/images/{row.object_id.hex()}")
    text = await (await client.get("/metrics")).text()
    assert 'image_search_http_requests_total{method="GET",route="/v1/images/{id}",status="200"}' in text
    assert row.object_id.hex() not in text


def searches_answered(status: str) -> float:
    labels = {"route": "/v1/search", "method": "POST", "status": status}
    return REGISTRY.get_sample_value("image_search_http_requests_total", labels) or 0.0


async def test_a_client_that_hangs_up_is_no_error_of_ours(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    before = searches_answered("499")
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"POST /v1/search HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 100\r\n\r\nabc")
    await writer.drain()
    while not client.app[SEARCHES].inside:
        await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    async with asyncio.timeout(5):
        while client.app[SEARCHES].inside:
            await asyncio.sleep(0.01)
        while searches_answered("499") == before:
            await asyncio.sleep(0.01)
    assert "Traceback" not in caplog.text


async def test_openapi_is_served(client: Client) -> None:
    document = await (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert document["paths"].keys() >= {"/v1/search", "/v1/events"}


async def test_the_page_and_its_parts(client: Client) -> None:
    for path, kind in (("/", "text/html"), ("/ui/app.js", "text/javascript"), ("/ui/style.css", "text/css")):
        response = await client.get(path)
        assert (response.status, response.content_type) == (200, kind)
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
    await refused(await client.get("/ui/../app.py"), ErrorCode.ROUTE_NOT_FOUND)


# -- every request -----------------------------------------------------------------------------------------------------
async def test_wrong_paths_and_methods(client: Client) -> None:
    await refused(await client.get("/v2/search"), ErrorCode.ROUTE_NOT_FOUND)
    response = await client.get("/v1/search")
    await refused(response, ErrorCode.METHOD_NOT_ALLOWED)
    assert response.headers["Allow"] == "POST"


async def test_request_ids(client: Client) -> None:
    assert (await client.get("/healthz/live", headers={"X-Request-Id": "mine-1"})).headers["X-Request-Id"] == "mine-1"
    for strange in ("a b", "x" * 65, "<script>"):
        given = (await client.get("/healthz/live", headers={"X-Request-Id": strange})).headers["X-Request-Id"]
        assert len(given) == 32


async def test_safe_headers_on_every_kind_of_answer(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)
    paths = ["/", "/nothing", "/v1/images", f"/v1/images/{row.object_id.hex()}/content", "/v1/events?follow=false"]
    for path in paths:
        headers = (await client.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Server"] == "image-search"
        assert "unsafe" not in headers["Content-Security-Policy"]


# -- start -------------------------------------------------------------------------------------------------------------
async def test_another_model_refuses_to_start(world: QueryWorld) -> None:
    world.fingerprint = ModelFingerprint("e" * 64)
    server = Server(init_app(settings(), world.resources()))
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_MODEL=angles"):
        await server.start_server()
    await server.close()


async def test_no_model_at_all_names_the_command() -> None:
    server = Server(init_app(settings(), QueryWorld().resources()))
    with pytest.raises(ConfigurationError, match="image-search upgrade"):
        await server.start_server()
    await server.close()
