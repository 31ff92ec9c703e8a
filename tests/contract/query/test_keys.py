"""Every route without a key, with a wrong and with a narrower one; what a key with places sees; what the browser is told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from query_service.api_keys import new_key
from query_service.app import ENDPOINTS
from query_service.endpoint import Endpoint
from schemas.access import Grant, Open, Scope, place_from_text
from schemas.api import ErrorCode
from tests.query_http import Client, keys_of, path_of, refused, running
from tests.query_world import QueryWorld, picture

GUARDED = [endpoint for endpoint in ENDPOINTS if not isinstance(endpoint.scope, Open)]
SITE = "https://photos.example.com"


@pytest.fixture
async def client(world: QueryWorld) -> AsyncIterator[Client]:
    async with running(world, api_keys="required", cors_origins=SITE) as client:
        yield client


async def key_for(world: QueryWorld, *scopes: Scope, places: tuple[str, ...] = ()) -> dict[str, str]:
    """The header that shows a new key."""
    made = new_key("test", Grant.of(scopes, map(place_from_text, places)))
    await world.metadata.add_api_key(made.stored)
    return {"Authorization": f"Bearer {made.text}"}


def named(endpoint: Endpoint) -> str:
    return f"{endpoint.method} {endpoint.path}"


@pytest.mark.parametrize("endpoint", GUARDED, ids=named)
async def test_a_route_wants_a_good_key_with_its_scope(world: QueryWorld, client: Client, endpoint: Endpoint) -> None:
    assert isinstance(endpoint.scope, Scope)
    good = await key_for(world, endpoint.scope)
    text = good["Authorization"].removeprefix("Bearer ")
    unknown = new_key("unknown", Grant.of([Scope.ADMIN])).text
    wrong = [{}, {"Authorization": f"Bearer {unknown}"}, {"X-API-Key": unknown}, {"X-API-Key": ""}]
    wrong += [{"Authorization": f"Basic {text}"}, {"Authorization": text}, {**good, "X-API-Key": unknown}]
    for headers in wrong:
        response = await client.request(endpoint.method, path_of(endpoint), headers=headers)
        error = await refused(response, ErrorCode.UNAUTHORIZED)
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert "isk_" not in error["message"]
    await refused(await client.request(endpoint.method, f"{path_of(endpoint)}?api_key={text}"), ErrorCode.UNAUTHORIZED)
    for scope in set(Scope) - {endpoint.scope, Scope.ADMIN}:
        response = await client.request(endpoint.method, path_of(endpoint), headers=await key_for(world, scope))
        assert (await refused(response, ErrorCode.FORBIDDEN))["details"]["needed"] == endpoint.scope
    for headers in (good, {"X-API-Key": text}, await key_for(world, Scope.ADMIN)):
        response = await client.request(endpoint.method, path_of(endpoint), headers=headers)
        assert response.status not in (401, 403)
        response.close()


@pytest.mark.parametrize("endpoint", [one for one in ENDPOINTS if isinstance(one.scope, Open)], ids=named)
async def test_an_open_route_asks_for_none(client: Client, endpoint: Endpoint) -> None:
    response = await client.request(endpoint.method, endpoint.path)
    assert response.status == 200


async def test_a_key_with_places_sees_nothing_else(world: QueryWorld, client: Client) -> None:
    mine, theirs = await world.put("mine/a.jpg", 10), await world.put("theirs/a.jpg", 11)
    other = await world.put("mine/b.jpg", 12, bucket="other")
    for row in (mine, theirs, other):
        await world.publish(row.ref.key, bucket=row.ref.bucket)
    headers = await key_for(world, Scope.READ, Scope.SEARCH, places=("images/mine/",))
    searched = await client.post("/v1/search", data=picture(10), headers={**headers, "Content-Type": "image/jpeg"})
    assert keys_of(await searched.json()) == ["mine/a.jpg"]
    for asked in ("bucket=other", "prefix=theirs/", 'filter={"must":[{"field":"key","match":{"prefix":"theirs/"}}]}'):
        wider = await client.post(f"/v1/search?{asked}", data=picture(10), headers={**headers, "Content-Type": "image/jpeg"})
        assert (await wider.json())["hits"] == []
        assert (await (await client.get(f"/v1/images?{asked}", headers=headers)).json())["images"] == []
    listed = await (await client.get("/v1/images", headers=headers)).json()
    assert [image["key"] for image in listed["images"]] == ["mine/a.jpg"]
    similar = await client.get(f"/v1/images/{mine.object_id.hex()}/similar", headers=headers)
    assert (await similar.json())["hits"] == []
    for row in (theirs, other):
        for tail in ("", "/content", "/similar"):
            response = await client.get(f"/v1/images/{row.object_id.hex()}{tail}", headers=headers)
            # As for an id that there is not: a refusal would say that there is something.
            assert (await refused(response, ErrorCode.IMAGE_NOT_FOUND))["details"] == {"state": None}
        waiting = f"/v1/images/{mine.object_id.hex()}?wait_for={row.object_id.hex()}:{row.etag}"
        waited = await client.get(waiting, headers=headers)
        assert (await refused(waited, ErrorCode.WAIT_TIMEOUT))["details"]["state"] is None
    events = await (await client.get("/v1/events?cursor=earliest&follow=false", headers=headers)).text()
    assert "mine/a.jpg" in events
    assert "theirs" not in events and "other" not in events
    paged = await (await client.get("/v1/events?cursor=earliest&wait=0", headers=headers)).json()
    assert [event["data"]["key"] for event in paged["events"]] == ["mine/a.jpg"]
    status = await (await client.get("/v1/status", headers=headers)).json()
    assert (status["images"]["indexed"], status["buckets"]) == (1, ["images"])


async def test_a_key_that_asks_too_fast_is_told_when_to_come_back(world: QueryWorld) -> None:
    async with running(world, api_keys="required", key_burst=2, key_requests_per_second=0.01) as client:
        headers = await key_for(world, Scope.READ)
        for _ in range(2):
            assert (await client.get("/v1/images", headers=headers)).status == 200
        response = await client.get("/v1/images", headers=headers)
        await refused(response, ErrorCode.TOO_MANY_REQUESTS)
        assert int(response.headers["Retry-After"]) > 1
        assert (await client.get("/v1/images", headers=await key_for(world, Scope.READ))).status == 200


async def test_a_key_is_in_no_log(world: QueryWorld, client: Client) -> None:
    headers = await key_for(world, Scope.SEARCH)
    with capture_logs() as lines:
        await client.get("/v1/images", headers=headers)
    text = headers["Authorization"].removeprefix("Bearer ")
    assert [line["key"] for line in lines if line["event"] == "request"] == [text.split("_")[1]]
    assert text.split("_", 2)[2] not in str(lines)


async def test_pages_of_named_sites_may_ask_and_no_others(world: QueryWorld, client: Client) -> None:
    headers = {**await key_for(world, Scope.READ), "Origin": SITE}
    allowed = await client.get("/v1/images", headers=headers)
    assert allowed.headers["Access-Control-Allow-Origin"] == SITE
    preflight = {"Origin": SITE, "Access-Control-Request-Method": "GET"}
    assert (await client.options("/v1/images", headers=preflight)).status == 204
    other = await client.get("/v1/images", headers={**headers, "Origin": "https://evil.example.com"})
    assert "Access-Control-Allow-Origin" not in other.headers
    refused_too = await client.options("/v1/images", headers={**preflight, "Origin": "null"})
    await refused(refused_too, ErrorCode.METHOD_NOT_ALLOWED)


@pytest.mark.parametrize("name", ["Host", "Origin"])
async def test_without_keys_other_sites_get_nothing(world: QueryWorld, name: str) -> None:
    async with running(world) as client:
        value = "evil.example.com:8080" if name == "Host" else "https://evil.example.com"
        await refused(await client.get("/v1/images", headers={name: value}), ErrorCode.FORBIDDEN)
        own = {"Origin": str(client.make_url("/")).rstrip("/")}
        assert (await client.get("/v1/images", headers=own)).status == 200
        assert (await client.get("/healthz/live", headers={name: value})).status == 200
