"""The parts of the object store that need no server."""

from __future__ import annotations

from typing import cast

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniopy_async import helpers

from infra.errors import ImageSearchError, StoreUnavailable
from infra.object_store.memory import MemoryObjectStore, Operation
from infra.object_store.names import check_bucket_name, check_place
from infra.object_store.s3 import body_chunks
from schemas.identity import ObjectRef

BUCKET = "pictures"
NAMES = st.text(alphabet="ab/. -_19é", max_size=12)


@given(key=NAMES | st.text(max_size=20))
def test_no_accepted_key_is_one_that_the_client_refuses(key: str) -> None:
    try:
        check_place(ObjectRef(BUCKET, key))
    except ImageSearchError:
        return
    helpers.check_object_name(key)
    helpers.quote(key)


@given(key=st.text(alphabet="ab.+% é", min_size=1).filter(lambda key: key.strip() and key not in (".", "..")))
def test_dots_and_blanks_within_a_segment_are_no_reason_to_refuse(key: str) -> None:
    check_place(ObjectRef(BUCKET, key))


@given(bucket=st.text(alphabet="ab.-19_Axn\n", max_size=10) | st.text(max_size=8) | st.ip_addresses(v=4).map(str))
def test_no_accepted_bucket_is_one_that_the_client_refuses(bucket: str) -> None:
    try:
        check_bucket_name(bucket)
    except ImageSearchError:
        return
    helpers.check_bucket_name(bucket, strict=True, s3_check=True)


@pytest.mark.parametrize("bucket", ["images", "my.pictures-2", "a1b", "x" * 63])
def test_usual_bucket_names_are_accepted(bucket: str) -> None:
    check_bucket_name(bucket)


@given(keys=st.sets(NAMES.filter(lambda key: key.strip("/. ") != "")), page_size=st.integers(1, 4), data=st.data())
async def test_pages_of_the_twin_join_to_the_whole_listing(keys: set[str], page_size: int, data: st.DataObject) -> None:
    store = MemoryObjectStore(BUCKET, page_size=page_size)
    put: set[str] = set()
    for key in keys:
        try:
            await store.put(ObjectRef(BUCKET, key), b"x")
            put.add(key)
        except ImageSearchError:
            continue
    start_after = data.draw(st.none() | NAMES)
    prefix = data.draw(NAMES)
    pages = [page async for page in store.list_pages(BUCKET, prefix=prefix, start_after=start_after)]
    assert all(1 <= len(page) <= page_size for page in pages)
    found = [stat.ref.key for page in pages for stat in page]
    assert found == sorted(key for key in put if key.startswith(prefix) and key > (start_after or ""))


async def test_a_fault_of_the_twin_comes_before_the_operation() -> None:
    store = MemoryObjectStore(BUCKET)
    ref = ObjectRef(BUCKET, "a.jpg")
    calls: list[tuple[Operation, str, str | None]] = []

    async def fail_puts(operation: Operation, bucket: str, key: str | None) -> None:
        calls.append((operation, bucket, key))
        if operation is Operation.PUT:
            raise StoreUnavailable("object store", "as told")

    store.before_call = fail_puts
    with pytest.raises(StoreUnavailable):
        await store.put(ref, b"x")
    assert [page async for page in store.list_pages(BUCKET)] == []
    assert calls == [(Operation.PUT, BUCKET, "a.jpg"), (Operation.LIST, BUCKET, None)]


async def test_the_twin_takes_its_time_from_the_clock_it_is_given() -> None:
    store = MemoryObjectStore(BUCKET, now_us=lambda: 5_999_999)
    assert (await store.put(ObjectRef(BUCKET, "a.jpg"), b"x")).put_time_us == 5_000_000


class CannedResponse:
    """As much of a response as is needed to read its body."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.content = self
        self._chunks = [*chunks, b""]

    async def readany(self) -> bytes:
        return self._chunks.pop(0)


@given(chunks=st.lists(st.binary(min_size=1, max_size=5), max_size=5), size=st.integers(0, 12))
async def test_a_body_of_another_size_is_never_handed_on_whole(chunks: list[bytes], size: int) -> None:
    response = cast(aiohttp.ClientResponse, CannedResponse(chunks))
    body = b"".join(chunks)
    found: list[bytes] = []
    try:
        async for chunk in body_chunks(response, size):
            found.append(chunk)
            assert len(b"".join(found)) <= size
    except StoreUnavailable:
        assert len(body) != size
    else:
        assert (b"".join(found), len(body)) == (body, size)
