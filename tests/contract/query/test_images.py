"""Images over HTTP: pages, one, similar ones, and bytes that are safe to open."""

from __future__ import annotations

import json

from schemas.api import ErrorCode
from schemas.events import ReasonCode
from schemas.identity import ObjectRef
from schemas.tables import RowState
from tests.query_http import Client, keys_of, refused
from tests.query_world import BUCKET, QueryWorld, picture


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


async def test_images_by_filter_in_pages(world: QueryWorld, client: Client) -> None:
    for name in ("a/1", "b/1", "a/2", "b/2", "a/3"):
        await world.put(name, 0)
    await world.set_row(ObjectRef(BUCKET, "a/bad"), b"", state=RowState.FAILED, reason=ReasonCode.EMPTY_OBJECT)
    a, large = {"field": "key", "match": {"prefix": "a/"}}, {"field": "size", "range": {"gt": 0}}
    parameters = {"filter": json.dumps({"must": [a, large]}), "bucket": BUCKET, "limit": "2"}
    first = await (await client.get("/v1/images", params=parameters)).json()
    second = await (await client.get("/v1/images", params={**parameters, "cursor": first["next"]})).json()
    assert [[image["key"] for image in page["images"]] for page in (first, second)] == [["a/1", "a/2"], ["a/3"]]
    assert second["next"] is None


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
