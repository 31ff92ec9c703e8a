"""Searching by what a JSON body names: pictures, objects, vectors, examples of both kinds; several at once; two compared."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from schemas.access import Scope
from schemas.api import LARGEST_WINDOW, ErrorCode
from schemas.identity import ObjectRef
from schemas.tables import RowState
from tests.contract.query.test_keys import key_for
from tests.query_http import Client, keys_of, refused, running
from tests.query_world import BUCKET, FINGERPRINT, QueryWorld, picture, score_between, vector_at


def in_base64(angle: int) -> str:
    return base64.b64encode(picture(angle)).decode()


async def found(client: Client, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/search", json=body)
    answer: dict[str, Any] = await response.json()
    assert response.status == 200, answer
    return answer


async def circle(world: QueryWorld, *angles: int) -> dict[int, str]:
    """Ids of pictures that point in these directions, each under its angle as key."""
    return {angle: (await world.put(str(angle), angle)).object_id.hex() for angle in angles}


async def test_a_picture_an_object_and_a_vector_find_the_same(world: QueryWorld, client: Client) -> None:
    ids = await circle(world, 0, 30, 60, 90)
    vector = [20.0 * float(value) for value in vector_at(30)]
    for body, expected in (
        ({"base64": in_base64(30)}, ["30", "0", "60", "90"]),
        ({"vector": vector}, ["30", "0", "60", "90"]),
        ({"id": ids[30]}, ["0", "60", "90"]),
        ({"positive": [{"id": ids[30], "weight": 3.0}]}, ["0", "60", "90"]),
    ):
        answer = await found(client, **body)
        hits = {hit["key"]: hit["score"] for hit in answer["hits"]}
        assert set(hits) == set(expected)
        assert list(hits)[-1] == "90"
        assert hits["0"] == pytest.approx(score_between(30, 0), abs=0.01)


async def test_examples_are_weighed(world: QueryWorld, client: Client) -> None:
    ids = await circle(world, 0, 40, 45, 80, 90, 180, 270)
    between = await found(client, positive=[{"base64": in_base64(0)}, {"base64": in_base64(90)}], limit=1)
    assert keys_of(between) == ["45"]
    nearer = await found(client, positive=[{"base64": in_base64(0), "weight": 5.0}, {"vector": [0, 1]}], limit=1)
    assert keys_of(nearer) == ["0"]
    unlike = await found(client, positive=[{"id": ids[0]}], negative=[{"id": ids[90], "weight": 1.0}])
    assert "0" not in keys_of(unlike) and "90" not in keys_of(unlike)
    assert keys_of(unlike)[0] == "270"
    away = await found(client, base64=in_base64(0), negative=[{"base64": in_base64(90), "weight": 0.01}], limit=1)
    assert keys_of(away) == ["0"]
    cancelled = await client.post("/v1/search", json={"positive": [{"vector": [1, 0]}], "negative": [{"vector": [1, 0]}]})
    await refused(cancelled, ErrorCode.INVALID_VECTOR)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, ErrorCode.INVALID_REQUEST),
        ({"id": "0" * 64, "vector": [1, 0]}, ErrorCode.INVALID_REQUEST),
        ({"id": "0" * 64, "positive": [{"vector": [1, 0]}]}, ErrorCode.INVALID_REQUEST),
        ({"negative": [{"vector": [1, 0]}]}, ErrorCode.INVALID_REQUEST),
        ({"positive": [{"vector": [1, 0], "base64": in_base64(1)}]}, ErrorCode.INVALID_REQUEST),
        ({"id": "0" * 64}, ErrorCode.IMAGE_NOT_FOUND),
        ({"id": "x"}, ErrorCode.INVALID_REQUEST),
        ({"base64": "%%%"}, ErrorCode.INVALID_REQUEST),
        ({"base64": base64.b64encode(b"text").decode()}, ErrorCode.NOT_AN_IMAGE),
        ({"vector": [1, 0, 0]}, ErrorCode.INVALID_VECTOR),
        ({"vector": [0, 0]}, ErrorCode.INVALID_REQUEST),
        ({"vector": [1e300, 0]}, ErrorCode.INVALID_REQUEST),
        ({"vector": [1, 0], "box": [0, 0, 1, 1]}, ErrorCode.INVALID_REQUEST),
        ({"base64": in_base64(1), "box": [0.5, 0, 0.5, 1]}, ErrorCode.INVALID_REQUEST),
        ({"vector": [1, 0], "offset": LARGEST_WINDOW}, ErrorCode.INVALID_REQUEST),
        ({"vector": [1, 0], "model": "unknown"}, ErrorCode.MODEL_NOT_FOUND),
        ({"vector": [1, 0], "filter": {"must": [{"field": "colour", "match": {"value": "red"}}]}}, ErrorCode.INVALID_FILTER),
        ({"vector": [1, 0], "url": "http://127.0.0.1/"}, ErrorCode.INVALID_REQUEST),
        ({"vector": [1, 0], "include": ["presigned_url"]}, ErrorCode.INVALID_REQUEST),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_searched_for(client: Client, body: dict[str, Any], code: ErrorCode) -> None:
    await refused(await client.post("/v1/search", json=body), code)


async def test_a_json_body_has_no_parameters_beside_it(client: Client) -> None:
    await refused(await client.post("/v1/search?limit=3", json={"vector": [1, 0]}), ErrorCode.INVALID_REQUEST)


async def test_a_box_is_a_part_of_the_picture(world: QueryWorld, client: Client) -> None:
    await circle(world, 10, 40)
    box = [0.3, 0.0, 1.0, 1.0]
    for part, whole in (
        ({"base64": in_base64(10), "box": box}, {"base64": in_base64(10)}),
        ({"positive": [{"base64": in_base64(10), "box": box}]}, {"positive": [{"base64": in_base64(10)}]}),
    ):
        assert keys_of(await found(client, **part, limit=1)) == ["40"]
        assert keys_of(await found(client, **whole, limit=1)) == ["10"]
    for parameter, key in (("?box=[0.3,0,1,1]", "40"), ("", "10")):
        answer = await client.post(f"/v1/search{parameter}", data=picture(10), headers={"Content-Type": "image/jpeg"})
        assert keys_of(await answer.json())[0] == key
    refused_box = await client.post("/v1/search?box=[1,0,0,1]", data=picture(10), headers={"Content-Type": "image/jpeg"})
    await refused(refused_box, ErrorCode.INVALID_REQUEST)


async def test_pages_and_bounds(world: QueryWorld, client: Client) -> None:
    await circle(world, *range(0, 50, 5))
    whole = keys_of(await found(client, base64=in_base64(0), limit=10))
    paged = [key for start in (0, 4, 8) for key in keys_of(await found(client, base64=in_base64(0), limit=4, offset=start))]
    assert paged == whole == [str(angle) for angle in range(0, 50, 5)]
    assert keys_of(await found(client, base64=in_base64(0), offset=100)) == []
    near = await found(client, base64=in_base64(0), max_distance=0.01)
    assert keys_of(near) == ["0", "5"]
    assert keys_of(await found(client, base64=in_base64(0), max_distance=4, min_score=99.6)) == ["0", "5"]
    page = await client.post("/v1/search?offset=2&limit=2", data=picture(0), headers={"Content-Type": "image/jpeg"})
    assert (keys_of(await page.json()), (await page.json())["offset"]) == (["10", "15"], 2)


async def test_of_hits_with_the_same_bytes_only_the_best_with_groups(world: QueryWorld, client: Client) -> None:
    for number in range(40):
        await world.put(f"copy/{number:02}", 0)
    await circle(world, 5, 10)
    groups = await found(client, base64=in_base64(0), group_by="content_hash", limit=2)
    assert [hit["key"].split("/")[0] for hit in groups["hits"]] == ["copy", "5"]
    assert groups["groups_exhausted"] is False
    whole = await found(client, base64=in_base64(0), group_by="content_hash", limit=10)
    assert [hit["key"].split("/")[0] for hit in whole["hits"]] == ["copy", "5", "10"]
    assert whole["groups_exhausted"] is True
    assert (await found(client, base64=in_base64(0), limit=1))["groups_exhausted"] is None


async def test_more_is_told_of_hits_when_asked_for(world: QueryWorld) -> None:
    first, _ = await world.put("mine/a", 0), await world.put("mine/b", 0)
    await world.put("theirs/c", 0)
    ref = ObjectRef(BUCKET, "failed")
    await world.set_row(ref, picture(0), state=RowState.FAILED)
    await world.metadata.patch_own_metadata(first.object_id, {"title": "One"})
    async with running(world, s3_public_endpoint="http://objects.test", presigned_seconds=60) as client:
        plain = (await found(client, base64=in_base64(0)))["hits"][0]
        assert (plain["metadata"], plain["duplicates"], plain["presigned_url"]) == (None, None, None)
        include = ["metadata", "duplicates", "presigned_url"]
        hits = {hit["key"]: hit for hit in (await found(client, base64=in_base64(0), include=include))["hits"]}
        assert (hits["mine/a"]["metadata"], hits["mine/b"]["metadata"]) == ({"title": "One"}, {})
        assert {hit["duplicates"] for hit in hits.values()} == {2}
        assert hits["mine/a"]["presigned_url"] == f"http://objects.test/{BUCKET}/mine/a?seconds=60"
        form = await client.post("/v1/search?include=duplicates", data=picture(0), headers={"Content-Type": "image/jpeg"})
        assert (await form.json())["hits"][0]["duplicates"] == 2
    async with running(world, api_keys="required") as client:
        headers = await key_for(world, Scope.SEARCH, places=(f"{BUCKET}/mine/",))
        body: dict[str, Any] = {"base64": in_base64(0), "include": ["duplicates"]}
        answer = await (await client.post("/v1/search", json=body, headers=headers)).json()
        assert [(hit["key"].split("/")[0], hit["duplicates"]) for hit in answer["hits"]] == [("mine", 1), ("mine", 1)]


async def test_a_key_with_places_searches_by_nothing_else(world: QueryWorld) -> None:
    theirs = (await world.put("theirs/a", 0)).object_id.hex()
    async with running(world, api_keys="required") as client:
        headers = await key_for(world, Scope.SEARCH, places=(f"{BUCKET}/mine/",))
        for path, wanted in (
            ("/v1/search", {"id": theirs}),
            ("/v1/search", {"vector": [1, 0], "negative": [{"id": theirs}]}),
            ("/v1/compare", {"one": {"id": theirs}, "other": {"vector": [1, 0]}}),
        ):
            await refused(await client.post(path, json=wanted, headers=headers), ErrorCode.IMAGE_NOT_FOUND)


async def test_several_searches_have_a_status_each(world: QueryWorld, client: Client) -> None:
    ids = await circle(world, 0, 90)
    searches = [{"base64": in_base64(0), "limit": 1}, {"id": "0" * 64}, {"id": ids[0]}, {"vector": [1, 0, 0]}]
    response = await client.post("/v1/search/batch", json={"searches": searches})
    results = (await response.json())["results"]
    assert [result["status"] for result in results] == [200, 404, 200, 400]
    assert [keys_of(result["answer"]) for result in results if result["answer"]] == [["0"], ["90"]]
    assert results[1]["error"]["error"]["code"] == "IMAGE_NOT_FOUND"
    assert results[1]["error"]["error"]["request_id"] == response.headers["X-Request-Id"]
    bodies: list[dict[str, Any]] = [{}, {"searches": []}, {"searches": [{"vector": [1, 0]}] * 33}, {"searches": [{}]}]
    for body in bodies:
        await refused(await client.post("/v1/search/batch", json=body), ErrorCode.INVALID_REQUEST)


async def test_two_are_compared(world: QueryWorld, client: Client) -> None:
    ids = await circle(world, 0)
    answer = await (await client.post("/v1/compare", json={"one": {"id": ids[0]}, "other": {"base64": in_base64(60)}})).json()
    assert answer == {"score": pytest.approx(50.0, abs=0.01), "distance": pytest.approx(1.0, abs=1e-3), "model": "angles"}
    await refused(await client.post("/v1/compare", json={"one": {"id": ids[0]}}), ErrorCode.INVALID_REQUEST)


async def test_a_model_is_named_by_name_or_fingerprint(world: QueryWorld, client: Client) -> None:
    await circle(world, 0)
    for name in ("angles", FINGERPRINT[:12]):
        assert keys_of(await found(client, vector=[1, 0], model=name)) == ["0"]
    await refused(await client.post("/v1/search", json={"vector": [1, 0], "model": "f"}), ErrorCode.MODEL_NOT_FOUND)
