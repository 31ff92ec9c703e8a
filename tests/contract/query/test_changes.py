"""Pictures put into their bucket and deleted from it over HTTP."""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import pytest
from yarl import URL

from infra.errors import ObjectGone
from schemas.access import Scope
from schemas.api import ErrorCode, WaitToken
from schemas.identity import ObjectRef
from tests.contract.query.test_keys import key_for
from tests.query_http import MAX_BYTES, Client, refused, running
from tests.query_world import BUCKET, QueryWorld, picture

JPEG = {"Content-Type": "image/jpeg"}


@pytest.mark.parametrize("key", ["a.jpg", "a/b c+d%20.jpg", "日本/ä.jpg", "x" * 255])
async def test_a_put_is_in_the_bucket_with_the_token_that_names_it(world: QueryWorld, client: Client, key: str) -> None:
    ref, data = ObjectRef(BUCKET, key), picture(1)
    response = await client.put(f"/v1/images/{BUCKET}/" + URL.build(path="/" + key).raw_path[1:], data=data, headers=JPEG)
    body = await response.json()
    stored = await world.objects.read(ref, max_bytes=MAX_BYTES)
    assert (response.status, stored.data, stored.stat.content_type) == (202, data, "image/jpeg")
    assert (body["id"], body["bucket"], body["key"]) == (ref.object_id.hex(), BUCKET, key)
    assert WaitToken.parse(body["wait_for"]) == WaitToken(ref.object_id, stored.stat.etag)
    await world.set_row(ref, data, etag=stored.stat.etag)
    assert (await client.get(f"/v1/images/{body['id']}", params={"wait_for": body["wait_for"]})).status == 200


async def test_only_types_of_pictures_are_kept(world: QueryWorld, client: Client) -> None:
    for sent, kept in (
        ("image/png", "image/png"),
        ("image/svg+xml", "application/octet-stream"),
        (None, "application/octet-stream"),
    ):
        headers = {} if sent is None else {"Content-Type": sent}
        await client.put(f"/v1/images/{BUCKET}/a", data=picture(1), headers=headers)
        assert (await world.objects.stat(ObjectRef(BUCKET, "a"))).content_type == kept


async def test_conditions(world: QueryWorld, client: Client) -> None:
    async def put(angle: int, **headers: str) -> aiohttp.ClientResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.put(f"/v1/images/{BUCKET}/a", data=picture(angle), headers={**JPEG, **named})

    await refused(await put(1, If_Match='"other"'), ErrorCode.PRECONDITION_FAILED)
    first = await put(1, If_None_Match="*")
    assert first.status == 202
    await refused(await put(2, If_None_Match="*"), ErrorCode.PRECONDITION_FAILED)
    await refused(await put(2, If_Match='"other"'), ErrorCode.PRECONDITION_FAILED)
    assert (await put(2, If_Match=f'"{(await first.json())["etag"]}"')).status == 202
    for bad in ({"If_Match": "*"}, {"If_None_Match": '"x"'}, {"If_Match": '"a", "b"'}, {"If_Match": 'W/"a"'}):
        await refused(await put(3, **bad), ErrorCode.INVALID_REQUEST)
    assert (await world.objects.read(ObjectRef(BUCKET, "a"), max_bytes=MAX_BYTES)).data == picture(2)


@pytest.mark.parametrize(
    "path",
    [
        "a%5Cb",
        "a//b",
        "/a",
        "a/",
        "a/%2E%2E/b",
        "a%00b",
        "a%0Ab",
        "%20",
        "x" * 256,
        ".image-search/a",
        "/".join(["k" * 204] * 6),
    ],
)
async def test_keys_that_are_not_made(world: QueryWorld, client: Client, path: str) -> None:
    url = URL(f"{client.make_url('/v1/images')}/{BUCKET}/{path}", encoded=True)
    async with aiohttp.ClientSession() as session:
        response = await session.put(url, data=picture(1), headers=JPEG)
        await refused(response, ErrorCode.INVALID_KEY)
    assert [page async for page in world.objects.list_pages(BUCKET)] == []


async def test_only_followed_buckets_are_written_to(world: QueryWorld, client: Client) -> None:
    row = await world.put("a", 0, bucket="other")
    for response in (
        await client.put("/v1/images/other/b", data=picture(1), headers=JPEG),
        await client.delete("/v1/images/other/a"),
        await client.delete(f"/v1/images/{row.object_id.hex()}"),
    ):
        error = await refused(response, ErrorCode.BUCKET_NOT_FOLLOWED)
        assert error["details"] == {"followed": [BUCKET]}
    await world.objects.stat(row.ref)


async def test_bodies_that_are_not_taken(world: QueryWorld, client: Client) -> None:
    async def put(data: object, **headers: str) -> aiohttp.ClientResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.put(f"/v1/images/{BUCKET}/a", data=data, headers={**JPEG, **named})

    async def in_chunks() -> object:
        yield picture(1)

    await refused(await put(b"x" * (MAX_BYTES + 1)), ErrorCode.BODY_TOO_LARGE)
    await refused(await put(in_chunks()), ErrorCode.LENGTH_REQUIRED)
    await refused(await put(b""), ErrorCode.MISSING_IMAGE)
    await refused(await put(b"x", Content_Type="text/html"), ErrorCode.UNSUPPORTED_MEDIA_TYPE)
    await refused(await put(b"x", Content_Encoding="gzip"), ErrorCode.UNSUPPORTED_CONTENT_ENCODING)
    with pytest.raises(ObjectGone):
        await world.objects.stat(ObjectRef(BUCKET, "a"))


async def _begin(client: Client) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A put that says 100 bytes and sends ten."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    head = f"PUT /v1/images/{BUCKET}/a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\nContent-Length: 100"
    writer.write(f"{head}\r\n\r\n".encode())
    writer.write(b"x" * 10)
    await writer.drain()
    return reader, writer


async def test_a_body_that_does_not_come_is_timed_out_and_not_stored(world: QueryWorld) -> None:
    async with running(world, body_timeout_seconds=0.1) as client:
        reader, writer = await _begin(client)
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 20)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert ErrorCode.BODY_TIMEOUT.encode() in answer
    with pytest.raises(ObjectGone):
        await world.objects.stat(ObjectRef(BUCKET, "a"))


async def test_a_sender_that_hangs_up_leaves_nothing(
    world: QueryWorld, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        _, writer = await _begin(client)
        writer.close()
        await writer.wait_closed()
        # The same place takes a whole put afterwards: the broken one holds nothing.
        response = await client.put(f"/v1/images/{BUCKET}/b", data=picture(1), headers=JPEG)
    assert response.status == 202
    with pytest.raises(ObjectGone):
        await world.objects.stat(ObjectRef(BUCKET, "a"))
    assert caplog.records == []


async def test_no_more_puts_at_once_than_there_is_room_for(world: QueryWorld) -> None:
    async with running(world, uploads_at_once=1, uploads_waiting=0) as client:
        _, writer = await _begin(client)
        deadline = asyncio.get_running_loop().time() + 20
        while True:
            response = await client.put(f"/v1/images/{BUCKET}/b", data=picture(1), headers=JPEG)
            if response.status == ErrorCode.TOO_MANY_REQUESTS.status:
                break
            assert asyncio.get_running_loop().time() < deadline
        assert response.headers["Retry-After"]
        writer.close()


async def test_deleting_by_id_and_by_key(world: QueryWorld, client: Client) -> None:
    first, second = await world.put("a/1.jpg", 1), await world.put("a/2.jpg", 2)
    for path, row in ((first.object_id.hex(), first), (f"{BUCKET}/a/2.jpg", second)):
        response = await client.delete(f"/v1/images/{path}")
        body = await response.json()
        assert (response.status, body["wait_for"]) == (202, f"{row.object_id.hex()}:deleted")
        assert (body["bucket"], body["key"], body["etag"]) == (BUCKET, row.ref.key, None)
        with pytest.raises(ObjectGone):
            await world.objects.stat(row.ref)
    # By key it is the same whether something was there or not; an id has to be known.
    assert (await client.delete(f"/v1/images/{BUCKET}/a/2.jpg")).status == 202
    await refused(await client.delete(f"/v1/images/{'0' * 64}"), ErrorCode.IMAGE_NOT_FOUND)
    await refused(await client.delete("/v1/images/xyz"), ErrorCode.INVALID_ID)
    await refused(await client.delete(URL(f"/v1/images/{BUCKET}/a/%2E%2E/b", encoded=True)), ErrorCode.INVALID_KEY)


async def test_metadata_is_merged_and_shown(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 1)
    path = f"/v1/images/{row.object_id.hex()}"
    assert (await (await client.get(path)).json())["metadata"] == {}
    for patch in ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}, "d": "日"}):
        response = await client.patch(path, json=patch, headers={"Content-Type": "application/merge-patch+json"})
        assert response.status == 200
    assert (await (await client.get(path)).json())["metadata"] == {"a": {"c": 2}, "d": "日"}
    for body in (b"[1]", b"{", b'{"a": NaN}', b"[" * 20_000, b"\xff"):
        headers = {"Content-Type": "application/json"}
        await refused(await client.patch(path, data=body, headers=headers), ErrorCode.INVALID_BODY)
    await refused(await client.patch(path, json={"x": "y" * 16_000, "z": "y" * 100_000}), ErrorCode.BODY_TOO_LARGE)
    await refused(await client.patch(path, data=b"{}"), ErrorCode.UNSUPPORTED_MEDIA_TYPE)
    assert (await client.patch(path, json={"x": "z" * 9_000})).status == 200
    await refused(await client.patch(path, json={"y": "z" * 9_000}), ErrorCode.INVALID_METADATA)
    await refused(await client.patch(f"/v1/images/{'0' * 64}", json={}), ErrorCode.IMAGE_NOT_FOUND)


async def test_a_key_with_places_changes_nothing_elsewhere(world: QueryWorld) -> None:
    mine, theirs = await world.put("mine/a.jpg", 1), await world.put("theirs/a.jpg", 2)
    async with running(world, api_keys="required") as client:
        headers = await key_for(world, Scope.READ, Scope.WRITE, places=(f"{BUCKET}/mine/",))
        assert (await client.put(f"/v1/images/{BUCKET}/mine/b.jpg", data=picture(3), headers={**headers, **JPEG})).status == 202
        for method, path in (("PUT", "theirs/b.jpg"), ("PUT", "mine"), ("DELETE", "theirs/a.jpg"), ("DELETE", "unknown")):
            data = picture(3) if method == "PUT" else None
            response = await client.request(method, f"/v1/images/{BUCKET}/{path}", data=data, headers={**headers, **JPEG})
            await refused(response, ErrorCode.FORBIDDEN)
        for method, body in (("PATCH", {"a": 1}), ("DELETE", None)):
            path = f"/v1/images/{theirs.object_id.hex()}"
            await refused(await client.request(method, path, json=body, headers=headers), ErrorCode.IMAGE_NOT_FOUND)
        assert (await client.patch(f"/v1/images/{mine.object_id.hex()}", json={"a": 1}, headers=headers)).status == 200
    await world.objects.stat(theirs.ref)
    assert await world.metadata.own_metadata([theirs.object_id]) == {}
