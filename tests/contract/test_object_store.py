"""One suite over the S3 store (a real SeaweedFS, a real MinIO) and its twin."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from infra import object_store
from infra.errors import ImageRejected, ObjectChanged, ObjectGone, StoreRefused, StoreUnavailable
from infra.object_store.interface import NotificationRule, ObjectStat, ObjectStore, Over
from infra.object_store.memory import MemoryObjectStore
from infra.settings import CommonSettings
from schemas.events import ReasonCode
from schemas.identity import ObjectRef
from tests.conftest import FreshSettings, Servers

LIMIT = 1 << 20
LONG_KEY = "/".join(["k" * 204] * 5)

KEYS = [
    "plain.jpg",
    "a b.jpg",
    "a+b.jpg",
    "a%20b.jpg",
    "100%.jpg",
    "a%2Fb.jpg",
    "dir/ä é.jpg",
    "e\u0301 decomposed.jpg",
    "\u00e9 composed.jpg",
    "日本/写真.png",
    "emoji 😀.png",
    " leading.jpg",
    "trailing.jpg ",
    "a..b.jpg",
    "..hidden",
    "dir/...",
    'it\'s "quoted".jpg',
    "semi;colon&amp;=?#.jpg",
    "brackets*~!@$^()[]{}|`<>.jpg",
    "tab\tand\nnewline",
    "Case.jpg",
    "case.jpg",
    LONG_KEY,
]

IMPOSSIBLE_KEYS = ["", " ", "a/../b", "..", "./a", "a/.", "not-utf-8-\udcff"]


@pytest.fixture
async def memory_store() -> AsyncIterator[ObjectStore]:
    yield MemoryObjectStore()


@pytest.fixture
async def seaweedfs_store(fresh_settings: FreshSettings) -> AsyncIterator[ObjectStore]:
    store = await object_store.connect(fresh_settings(CommonSettings))
    yield store
    await store.close()


@pytest.fixture
async def minio_store(full_servers: Servers) -> AsyncIterator[ObjectStore]:
    store = await object_store.connect(full_servers.settings)
    yield store
    await store.close()


@pytest.fixture(params=["memory", "seaweedfs", "minio"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    found: ObjectStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
async def bucket(store: ObjectStore) -> str:
    name = f"contract-{uuid.uuid4().hex[:12]}"
    await store.ensure_bucket(name)
    return name


async def listed(store: ObjectStore, bucket: str, prefix: str = "", start_after: str | None = None) -> list[ObjectStat]:
    pages = store.list_pages(bucket, prefix=prefix, start_after=start_after)
    return [stat async for page in pages for stat in page]


def identity_of(stat: ObjectStat) -> tuple[ObjectRef, str, int, int]:
    return stat.ref, stat.etag, stat.put_time_us, stat.size


def test_the_long_key_is_as_long_as_a_key_may_be() -> None:
    assert len(LONG_KEY.encode()) == 1024


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
async def test_every_key_comes_back_as_it_was_put(store: ObjectStore, bucket: str, key: str) -> None:
    ref = ObjectRef(bucket, key)
    await store.put(ref, key.encode(), "image/jpeg")
    assert (await store.read(ref, max_bytes=LIMIT)).data == key.encode()
    assert (await store.stat(ref)).ref == ref
    assert [stat.ref for stat in await listed(store, bucket)] == [ref]
    await store.delete(ref)
    assert await listed(store, bucket) == []
    with pytest.raises(ObjectGone):
        await store.read(ref, max_bytes=LIMIT)


async def test_one_object_is_described_alike_by_put_stat_read_open_and_listing(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "a.jpg")
    data = b"some bytes"
    put = await store.put(ref, data, "image/jpeg")
    read = await store.read(ref, max_bytes=LIMIT)
    async with store.open(ref) as stream:
        opened = stream.stat
    described = [put, await store.stat(ref), read.stat, opened, *await listed(store, bucket)]
    assert {identity_of(stat) for stat in described} == {identity_of(put)}
    assert put.etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
    assert put.put_time_us % 1_000_000 == 0
    assert read.stat.content_type == "image/jpeg"


async def test_an_overwrite_is_read_with_its_own_etag(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "a.jpg")
    first = await store.put(ref, b"first")
    second = await store.put(ref, b"the second")
    found = await store.read(ref, max_bytes=LIMIT)
    assert (found.data, found.stat.etag, found.stat.size) == (b"the second", second.etag, 10)
    assert first.etag != second.etag
    assert second.put_time_us >= first.put_time_us


async def test_text_is_not_compressed_on_the_way(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "a.txt")
    data = b"a line that repeats itself\n" * 2000
    await store.put(ref, data, "text/plain")
    assert (await store.read(ref, max_bytes=LIMIT)).data == data


async def test_an_empty_object_is_an_object(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "empty.jpg")
    await store.put(ref, b"")
    found = await store.read(ref, max_bytes=0)
    assert (found.data, found.stat.size) == (b"", 0)


async def test_the_limit_counts_bytes_and_is_inclusive(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "large.jpg")
    await store.put(ref, bytes(1001))
    assert len((await store.read(ref, max_bytes=1001)).data) == 1001
    with pytest.raises(ImageRejected) as caught:
        await store.read(ref, max_bytes=1000)
    assert caught.value.reason is ReasonCode.OBJECT_TOO_LARGE


async def test_what_was_never_put_is_gone(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "nothing.jpg")
    with pytest.raises(ObjectGone):
        await store.read(ref, max_bytes=LIMIT)
    with pytest.raises(ObjectGone):
        await store.stat(ref)
    with pytest.raises(ObjectGone):
        async with store.open(ref):
            pass
    await store.delete(ref)
    await store.delete(ref)


async def test_a_missing_bucket_is_a_fault_and_never_a_deletion(store: ObjectStore) -> None:
    missing = f"missing-{uuid.uuid4().hex[:12]}"
    ref = ObjectRef(missing, "a.jpg")

    async def opened() -> None:
        async with store.open(ref):
            pass

    calls = [
        store.read(ref, max_bytes=LIMIT),
        store.stat(ref),
        opened(),
        store.put(ref, b"x"),
        store.delete(ref),
        listed(store, missing),
        store.check(missing),
    ]
    for call in calls:
        with pytest.raises(StoreRefused) as caught:
            await call
        assert caught.value.reason is ReasonCode.BUCKET_NOT_FOUND
    with pytest.raises(StoreRefused):  # the put made none
        await store.check(missing)


@pytest.mark.parametrize("name", ["", "ab", "Upper", "a..b", "under_score", "192.168.0.1", "new\nline", "trailing\n", "a" * 64])
async def test_what_can_be_no_bucket_is_a_missing_bucket(store: ObjectStore, name: str) -> None:
    for call in (store.check(name), store.ensure_bucket(name), store.stat(ObjectRef(name, "a.jpg")), listed(store, name)):
        with pytest.raises(StoreRefused) as caught:
            await call
        assert caught.value.reason is ReasonCode.BUCKET_NOT_FOUND


@pytest.mark.parametrize("key", IMPOSSIBLE_KEYS, ids=range(len(IMPOSSIBLE_KEYS)))
async def test_a_key_that_no_request_can_carry_is_unreadable_and_not_gone(store: ObjectStore, bucket: str, key: str) -> None:
    ref = ObjectRef(bucket, key)
    for call in (store.read(ref, max_bytes=LIMIT), store.stat(ref), store.put(ref, b"x"), store.delete(ref)):
        with pytest.raises(ImageRejected) as caught:
            await call
        assert caught.value.reason is ReasonCode.OBJECT_UNREADABLE


async def test_a_large_object_streams_whole(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "large.jpg")
    data = bytes(range(256)) * 4096
    await store.put(ref, data, "image/jpeg")
    async with store.open(ref) as stream:
        chunks = [chunk async for chunk in stream.chunks]
    assert b"".join(chunks) == data
    assert stream.stat.size == len(data)
    assert len(chunks) > 1


class SenderStopped(Exception):
    pass


async def chunks_of(data: bytes, *, stop_after: int | None = None) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 64 * 1024):
        await asyncio.sleep(0)
        yield data[start : start + 64 * 1024]
        if stop_after is not None and start >= stop_after:
            raise SenderStopped


async def put_streamed(store: ObjectStore, ref: ObjectRef, data: bytes, over: Over | None = None) -> str:
    return await store.put_stream(ref, chunks_of(data), size=len(data), content_type="image/png", within_seconds=60, over=over)


@pytest.mark.parametrize("size", [1, 100_000, 12 * 1024 * 1024 + 1])
async def test_a_streamed_put_is_the_object_it_says(store: ObjectStore, bucket: str, size: int) -> None:
    ref = ObjectRef(bucket, "dir/ä é+%20.png")
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    etag = await put_streamed(store, ref, data)
    stat = await store.stat(ref)
    assert (stat.etag, stat.size, stat.content_type) == (etag, size, "image/png")
    assert (await store.read(ref, max_bytes=size)).data == data


async def test_a_put_whose_sender_stops_leaves_what_was_there(store: ObjectStore, bucket: str) -> None:
    ref, data = ObjectRef(bucket, "a.png"), b"x" * 1_000_000
    before = await put_streamed(store, ref, b"before")
    for other in (ref, ObjectRef(bucket, "new.png")):
        with pytest.raises(SenderStopped):
            await store.put_stream(
                other, chunks_of(data, stop_after=500_000), size=len(data), content_type="image/png", within_seconds=60
            )
    for length in (len(data) - 1, len(data) + 1):
        with pytest.raises(StoreUnavailable):
            await store.put_stream(ref, chunks_of(data), size=length, content_type="image/png", within_seconds=60)
    assert [(stat.ref, stat.etag) for stat in await listed(store, bucket)] == [(ref, before)]


async def test_a_put_on_conditions(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "a.png")
    with pytest.raises(ObjectChanged):
        await put_streamed(store, ref, b"over what never was", Over("0" * 32))
    first = await put_streamed(store, ref, b"first", Over(None))
    for over in (Over(None), Over("0" * 32)):
        with pytest.raises(ObjectChanged):
            await put_streamed(store, ref, b"other", over)
    assert (await store.stat(ref)).etag == first
    second = await put_streamed(store, ref, b"second", Over(first))
    assert (await store.stat(ref)).etag == second


async def test_a_streamed_put_into_no_bucket(store: ObjectStore) -> None:
    ref = ObjectRef("contract-no-such-bucket", "a.png")
    with pytest.raises(StoreRefused) as refused:
        await put_streamed(store, ref, b"data")
    assert refused.value.reason is ReasonCode.BUCKET_NOT_FOUND


async def test_a_stream_left_early_costs_no_connection(store: ObjectStore, bucket: str) -> None:
    ref = ObjectRef(bucket, "large.jpg")
    await store.put(ref, bytes(LIMIT))
    for _ in range(100):  # more than the connections of a store
        async with store.open(ref) as stream:
            await anext(stream.chunks)
    assert (await store.stat(ref)).size == LIMIT


async def test_a_listing_can_be_taken_up_behind_any_page(store: ObjectStore, bucket: str) -> None:
    keys = [f"d{number % 7}/e{number % 3}/f {number:04d}.jpg" for number in range(700)]
    keys += [f"d{number % 7}-x+{number}.jpg" for number in range(200)]
    keys += [f"top ä%{number}.jpg" for number in range(205)]
    free = asyncio.Semaphore(16)

    async def put(key: str) -> None:
        async with free:
            await store.put(ObjectRef(bucket, key), b"x")

    await asyncio.gather(*map(put, keys))
    pages = [page async for page in store.list_pages(bucket)]
    found = [stat.ref.key for page in pages for stat in page]
    assert sorted(found) == sorted(keys)
    assert [len(page) for page in pages] == [1000, 105]
    for position in (0, 1, 499, 999, 1000, 1103, 1104):
        behind = await listed(store, bucket, start_after=found[position])
        assert [stat.ref.key for stat in behind] == found[position + 1 :], position
    for prefix in ("d1", "d1/", "d1/e0/f 00", "top ä%1", "none"):
        narrowed = [stat.ref.key for stat in await listed(store, bucket, prefix=prefix)]
        assert narrowed == [key for key in found if key.startswith(prefix)], prefix


async def test_a_listing_goes_on_behind_a_key_deleted_meanwhile(store: ObjectStore, bucket: str) -> None:
    for key in ("a", "b", "c"):
        await store.put(ObjectRef(bucket, key), b"x")
    await store.delete(ObjectRef(bucket, "b"))
    assert [stat.ref.key for stat in await listed(store, bucket, start_after="b")] == ["c"]


async def test_an_empty_bucket_lists_nothing(store: ObjectStore, bucket: str) -> None:
    assert [page async for page in store.list_pages(bucket)] == []


async def test_a_directory_marker_is_listed_with_its_slash(store: ObjectStore, bucket: str) -> None:
    await store.put(ObjectRef(bucket, "dir/"), b"")
    await store.put(ObjectRef(bucket, "dir/a.jpg"), b"x")
    found = await listed(store, bucket)
    assert {stat.ref.key: stat.is_directory_marker for stat in found} == {"dir/": True, "dir/a.jpg": False}


async def test_a_bucket_is_made_once(store: ObjectStore) -> None:
    name = f"contract-{uuid.uuid4().hex[:12]}"
    await asyncio.gather(*(store.ensure_bucket(name) for _ in range(4)))
    await store.put(ObjectRef(name, "kept.jpg"), b"x")
    await store.ensure_bucket(name)
    await store.check(name)
    assert [stat.ref.key for stat in await listed(store, name)] == ["kept.jpg"]


# -- notification rules, on the stores that have them --------------------------------------------------------------------
@dataclass(frozen=True)
class Announcer:
    """A store with a bucket, and two targets that its rules may name."""

    store: ObjectStore
    bucket: str
    targets: tuple[str, ...]


@pytest.fixture
async def memory_announcer() -> AsyncIterator[Announcer]:
    targets = ("arn:minio:sqs::direct:kafka", "arn:minio:sqs::stored:kafka")
    yield Announcer(MemoryObjectStore("contract", targets=targets), "contract", targets)


@pytest.fixture
async def minio_announcer(minio_store: ObjectStore, full_servers: Servers) -> AsyncIterator[Announcer]:
    bucket = f"contract-{uuid.uuid4().hex[:12]}"
    await minio_store.ensure_bucket(bucket)
    yield Announcer(minio_store, bucket, full_servers.settings.notification_arns)


@pytest.fixture(params=["memory", "minio"])
def announcer(request: pytest.FixtureRequest) -> Announcer:
    found: Announcer = request.getfixturevalue(f"{request.param}_announcer")
    return found


async def test_a_bucket_begins_without_notification_rules(announcer: Announcer) -> None:
    assert await announcer.store.notification_rules(announcer.bucket) == []


async def test_notification_rules_come_back_as_they_were_set_and_take_the_place_of_all(announcer: Announcer) -> None:
    store, bucket = announcer.store, announcer.bucket
    one = NotificationRule(announcer.targets[0], frozenset({"s3:ObjectCreated:*", "s3:ObjectRemoved:*"}), "one")
    other = NotificationRule(announcer.targets[1], frozenset({"s3:ObjectCreated:Put"}), "other", prefix="a b/ä", suffix=".JPG")
    await store.set_notification_rules(bucket, [one, other])
    assert {*await store.notification_rules(bucket)} == {one, other}
    await store.set_notification_rules(bucket, [other])
    assert await store.notification_rules(bucket) == [other]
    await store.set_notification_rules(bucket, [])
    assert await store.notification_rules(bucket) == []


async def test_a_rule_to_an_unknown_target_is_refused_and_changes_nothing(announcer: Announcer) -> None:
    rule = NotificationRule(announcer.targets[0], frozenset({"s3:ObjectCreated:*"}), "one")
    await announcer.store.set_notification_rules(announcer.bucket, [rule])
    with pytest.raises(StoreRefused) as caught:
        await announcer.store.set_notification_rules(announcer.bucket, [replace(rule, target="arn:minio:sqs::nobody:kafka")])
    assert caught.value.reason is ReasonCode.OBJECT_UNREADABLE
    assert await announcer.store.notification_rules(announcer.bucket) == [rule]


async def test_rules_of_a_missing_bucket(announcer: Announcer) -> None:
    for call in (
        announcer.store.notification_rules("no-such-bucket-0"),
        announcer.store.set_notification_rules("no-such-bucket-0", []),
    ):
        with pytest.raises(StoreRefused) as caught:
            await call
        assert caught.value.reason is ReasonCode.BUCKET_NOT_FOUND


async def test_seaweedfs_has_no_rules_and_refuses_them(seaweedfs_store: ObjectStore) -> None:
    name = f"contract-{uuid.uuid4().hex[:12]}"
    await seaweedfs_store.ensure_bucket(name)
    rule = NotificationRule("arn:minio:sqs::direct:kafka", frozenset({"s3:ObjectCreated:*"}), "one")
    with pytest.raises(StoreRefused):
        await seaweedfs_store.set_notification_rules(name, [rule])
