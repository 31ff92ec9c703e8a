"""What holds for every request, for those who run the service, and at its start."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from infra.errors import ConfigurationError, StoreUnavailable
from infra.kafka.memory import Operation as BrokerOperation
from query_service.app import init_app
from query_service.keys import SEARCHES
from schemas.api import ErrorCode
from schemas.identity import ModelFingerprint, ObjectRef
from schemas.tables import RowState
from schemas.topics import Topic
from tests.query_http import Client, refused, settings
from tests.query_world import BUCKET, QueryWorld, Server


async def test_status(world: QueryWorld, client: Client) -> None:
    await world.put("a.jpg", 0)
    await world.set_row(ObjectRef(BUCKET, "bad"), b"", state=RowState.FAILED)
    status = await (await client.get("/v1/status")).json()
    assert status["images"] == {"indexed": 1, "failed": 1, "ignored": 0, "deleted": 0}
    assert status["model"]["name"] == "angles"
    assert status["lag"]["objects"] == {"pending": 0, "partitions": 4}
    assert status["freshness"]["reason"] is None
    assert status["freshness"]["indexed_through"].startswith("2023-11-14T22:13:19.6")


async def test_a_bucket_that_is_added_is_looked_after_without_a_restart(world: QueryWorld, client: Client) -> None:
    assert (await (await client.get("/v1/status")).json())["buckets"] == [BUCKET]
    await world.metadata.add_bucket("holiday")
    assert (await (await client.get("/v1/status")).json())["buckets"] == [BUCKET, "holiday"]
    assert (await client.get("/healthz/ready")).status == 503  # there is no such bucket yet
    await world.objects.ensure_bucket("holiday")
    assert (await client.get("/healthz/ready")).status == 200


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
    writer.write(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: 100\r\n\r\nabc")
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
