"""What the S3 store makes of servers that misbehave. A server of our own plays each fault: a real one will not on request."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr

from infra import object_store
from infra.errors import ImageRejected, ObjectGone, StoreRefused, StoreUnavailable
from infra.object_store.interface import ObjectStore
from infra.settings import CommonSettings
from schemas.events import ReasonCode
from schemas.identity import ObjectRef
from tests.conftest import FreshSettings

REF = ObjectRef("pictures", "a.jpg")
DATE = "Mon, 23 Nov 2026 09:30:25 GMT"
DATE_US = 1_795_426_225_000_000
OBJECT_HEADERS = f'ETag: "0123456789abcdef"\r\nLast-Modified: {DATE}\r\nContent-Type: image/jpeg\r\n'

Answer = Callable[[str, str, asyncio.StreamWriter], Awaitable[None]]
"""Writes the answer to a request (method, path) and returns; the connection is kept unless the writer was closed."""


class FaultyServer:
    """An HTTP server that answers as it is told, and counts."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[tuple[str, str]] = []
        self.port = 0
        self._handlers: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.decode().split(" ", 2)
                self.requests.append((method, path))
                await self.answer(method, path, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._handlers.discard(task)

    async def stop(self) -> None:
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)


@asynccontextmanager
async def faulty_store(answer: Answer, timeout_seconds: float = 5.0) -> AsyncIterator[tuple[ObjectStore, FaultyServer]]:
    faulty = FaultyServer(answer)
    server = await asyncio.start_server(faulty.serve, "127.0.0.1", 0)
    faulty.port = server.sockets[0].getsockname()[1]
    settings = CommonSettings(
        s3_endpoint=f"http://127.0.0.1:{faulty.port}",
        s3_access_key="key",
        s3_secret_key=SecretStr("secret"),
        s3_timeout_seconds=timeout_seconds,
        s3_connections=2,
    )
    store = await object_store.connect(settings)
    try:
        yield store, faulty
    finally:
        await store.close()
        server.close()
        await faulty.stop()


def reply(status: str, headers: str = "", body: bytes = b"", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {size}\r\n\r\n".encode() + body


def error_reply(method: str, status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>do not show</Message></Error>".encode()
    if method == "HEAD":
        return reply(status, "Content-Type: application/xml\r\n", length=len(body))
    return reply(status, "Content-Type: application/xml\r\n", body)


def always(answer: bytes) -> Answer:
    async def write(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return write


def refusing(status: str, code: str) -> Answer:
    async def write(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(error_reply(method, status, code))

    return write


def missing_key(bucket_status: str, status: str = "404 Not Found", code: str = "NoSuchKey") -> Answer:
    """Nothing at any key; a HEAD of the bucket is answered with `bucket_status`."""

    async def write(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(bucket_status) if path == "/pictures" else error_reply(method, status, code))

    return write


async def read_all(store: ObjectStore) -> bytes:
    return (await store.read(REF, max_bytes=1 << 20)).data


async def stream_all(store: ObjectStore) -> bytes:
    async with store.open(REF) as stream:
        return b"".join([chunk async for chunk in stream.chunks])


async def list_all(store: ObjectStore) -> int:
    return sum([len(page) async for page in store.list_pages("pictures")])


READERS = [read_all, stream_all]
CALLS: list[Callable[[ObjectStore], Awaitable[object]]] = [
    read_all,
    stream_all,
    list_all,
    lambda store: store.stat(REF),
    lambda store: store.put(REF, b"x"),
    lambda store: store.delete(REF),
    lambda store: store.check("pictures"),
    lambda store: store.ensure_bucket("pictures"),
]
CALL_NAMES = ["read", "open", "list", "stat", "put", "delete", "check", "ensure_bucket"]


@pytest.mark.parametrize("read", READERS)
async def test_a_truncated_body_is_never_short_data(read: Callable[[ObjectStore], Awaitable[bytes]]) -> None:
    async def truncated(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply("200 OK", OBJECT_HEADERS, b"only half", length=18))
        await writer.drain()
        writer.close()

    async with faulty_store(truncated) as (store, _):
        with pytest.raises(StoreUnavailable):
            await read(store)


async def test_a_length_that_does_not_fit_the_body_is_never_short_data() -> None:
    headers = f"{OBJECT_HEADERS}Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = f"HTTP/1.1 200 OK\r\n{headers}4\r\nhalf\r\n0\r\n\r\n".encode()
    async with faulty_store(always(answer)) as (store, _):
        with pytest.raises(StoreUnavailable):
            await read_all(store)


async def test_a_put_is_not_sent_to_a_bucket_that_is_missing() -> None:
    async def makes_what_is_missing(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply("404 Not Found") if method == "HEAD" else reply("200 OK", 'ETag: "new"\r\n'))

    async with faulty_store(makes_what_is_missing) as (store, server):
        with pytest.raises(StoreRefused):
            await store.put(REF, b"x")
        assert server.requests == [("HEAD", "/pictures")]


@pytest.mark.parametrize("call", CALLS, ids=CALL_NAMES)
@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down", "429 Too Many Requests"])
async def test_a_failing_server_is_unavailable_and_asked_once(
    call: Callable[[ObjectStore], Awaitable[object]], status: str
) -> None:
    async with faulty_store(refusing(status, "InternalError")) as (store, server):
        with pytest.raises(StoreUnavailable) as caught:
            await call(store)
        assert len(server.requests) == 1
    assert "do not show" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS, ids=CALL_NAMES)
async def test_denied_access_is_a_refusal(call: Callable[[ObjectStore], Awaitable[object]]) -> None:
    async with faulty_store(refusing("403 Forbidden", "SignatureDoesNotMatch")) as (store, _):
        with pytest.raises(StoreRefused) as caught:
            await call(store)
    assert caught.value.reason is ReasonCode.ACCESS_DENIED


@pytest.mark.parametrize("call", CALLS[:6], ids=CALL_NAMES[:6])
async def test_a_page_of_some_proxy_is_unavailable_and_deletes_nothing(
    call: Callable[[ObjectStore], Awaitable[object]],
) -> None:
    page = reply("404 Not Found", "Content-Type: text/html\r\n", b"<html>no such page</html>")

    async def proxy(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply("404 Not Found") if method == "HEAD" else page)

    async with faulty_store(proxy) as (store, _):
        with pytest.raises((StoreUnavailable, StoreRefused)):
            await call(store)


@pytest.mark.parametrize("call", [read_all, stream_all, lambda store: store.stat(REF)], ids=["read", "open", "stat"])
async def test_gone_is_said_only_when_the_bucket_answers(call: Callable[[ObjectStore], Awaitable[object]]) -> None:
    async with faulty_store(missing_key("200 OK")) as (store, _):
        with pytest.raises(ObjectGone):
            await call(store)
    async with faulty_store(missing_key("404 Not Found")) as (store, _):
        with pytest.raises(StoreRefused) as caught:
            await call(store)
        assert caught.value.reason is ReasonCode.BUCKET_NOT_FOUND
    async with faulty_store(missing_key("503 Service Unavailable")) as (store, _):
        with pytest.raises(StoreUnavailable):
            await call(store)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("status", "code"), [("404 Not Found", "NoSuchUpload"), ("405 Method Not Allowed", "NoSuchKey")])
async def test_other_refusals_are_not_gone(read: Callable[[ObjectStore], Awaitable[bytes]], status: str, code: str) -> None:
    async with faulty_store(missing_key("200 OK", status, code)) as (store, _):
        with pytest.raises((StoreUnavailable, StoreRefused)):
            await read(store)


@pytest.mark.parametrize("call", CALLS, ids=CALL_NAMES)
async def test_a_silent_server_is_unavailable_within_the_time_out(call: Callable[[ObjectStore], Awaitable[object]]) -> None:
    async def silent(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with faulty_store(silent, timeout_seconds=0.2) as (store, server), asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await call(store)
        assert server.requests


@pytest.mark.parametrize("read", READERS)
async def test_reads_that_stall_give_their_connections_back(read: Callable[[ObjectStore], Awaitable[bytes]]) -> None:
    stalled = True

    async def stalling(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        if not stalled:
            writer.write(reply("200 OK", OBJECT_HEADERS, b"whole"))
            return
        writer.write(reply("200 OK", OBJECT_HEADERS, b"half", length=8))
        await writer.drain()
        await asyncio.sleep(60)

    async with faulty_store(stalling, timeout_seconds=0.1) as (store, _):
        for _ in range(5):  # with two connections
            with pytest.raises(StoreUnavailable):
                await read(store)
        stalled = False
        assert await read(store) == b"whole"


async def test_a_slow_trickle_ends_with_the_time_out() -> None:
    async def trickling(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply("200 OK", OBJECT_HEADERS, length=1000))
        for _ in range(1000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with faulty_store(trickling, timeout_seconds=0.3) as (store, _), asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await read_all(store)


async def test_a_refused_connection_is_unavailable() -> None:
    async with faulty_store(always(b"")) as (store, server):
        pass
    settings = CommonSettings(s3_endpoint=f"http://127.0.0.1:{server.port}", s3_access_key="k", s3_secret_key=SecretStr("s"))
    store = await object_store.connect(settings)
    try:
        with pytest.raises(StoreUnavailable):
            await store.check("pictures")
    finally:
        await store.close()


async def test_an_object_above_the_limit_is_refused_before_its_body() -> None:
    async with faulty_store(always(reply("200 OK", OBJECT_HEADERS, b"begins", length=10**12))) as (store, _):
        with pytest.raises(ImageRejected) as caught:
            await store.read(REF, max_bytes=1000)
    assert caught.value.reason is ReasonCode.OBJECT_TOO_LARGE


async def test_bytes_that_were_stored_compressed_are_not_inflated() -> None:
    headers = OBJECT_HEADERS + "Content-Encoding: gzip\r\n"
    async with faulty_store(always(reply("200 OK", headers, b"\x1f\x8b not really"))) as (store, _):
        assert await read_all(store) == b"\x1f\x8b not really"
        assert await stream_all(store) == b"\x1f\x8b not really"


@pytest.mark.parametrize(
    "headers",
    [
        f"Last-Modified: {DATE}\r\n",
        'ETag: "0123456789abcdef"\r\n',
        'ETag: "0123456789abcdef"\r\nLast-Modified: yesterday\r\n',
    ],
)
@pytest.mark.parametrize("read", READERS)
async def test_bytes_without_a_description_are_not_taken(read: Callable[[ObjectStore], Awaitable[bytes]], headers: str) -> None:
    async with faulty_store(always(reply("200 OK", headers, b"bytes"))) as (store, _):
        with pytest.raises(StoreUnavailable):
            await read(store)


async def test_a_listing_with_milliseconds_tells_the_put_time_that_headers_tell() -> None:
    listing = (
        "<?xml version='1.0'?><ListBucketResult><Name>pictures</Name><IsTruncated>false</IsTruncated><Contents><Key>a.jpg</Key>"
        '<LastModified>2026-11-23T09:30:25.999Z</LastModified><ETag>"0123456789abcdef"</ETag><Size>5</Size></Contents>'
        "</ListBucketResult>"
    )

    async def answer(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        if "list-type" in path:
            writer.write(reply("200 OK", "Content-Type: application/xml\r\n", listing.encode()))
        elif method == "HEAD":
            writer.write(reply("200 OK", OBJECT_HEADERS, length=5))
        else:
            writer.write(reply("200 OK", OBJECT_HEADERS, b"bytes"))

    async with faulty_store(answer) as (store, _):
        listed = [stat async for page in store.list_pages("pictures") for stat in page]
        times = {
            listed[0].put_time_us,
            (await store.stat(REF)).put_time_us,
            (await store.read(REF, max_bytes=9)).stat.put_time_us,
        }
    assert times == {DATE_US}


@pytest.mark.parametrize("body", [b"", b"<not xml", b"<?xml version='1.0'?><Other/>"])
async def test_a_listing_that_cannot_be_parsed_is_unavailable(body: bytes) -> None:
    async with faulty_store(always(reply("200 OK", "Content-Type: application/xml\r\n", body))) as (store, _):
        with pytest.raises(StoreUnavailable):
            await list_all(store)


async def test_a_put_that_was_overtaken_describes_what_was_put() -> None:
    async def overtaken(method: str, path: str, writer: asyncio.StreamWriter) -> None:
        if method == "HEAD":
            writer.write(reply("200 OK", OBJECT_HEADERS, length=5))
        else:
            writer.write(reply("200 OK", f'ETag: "ours"\r\nDate: {DATE}\r\n'))

    async with faulty_store(overtaken) as (store, _):
        stat = await store.put(REF, b"", "image/jpeg")
    assert (stat.ref, stat.etag, stat.put_time_us, stat.size) == (REF, "ours", DATE_US, 0)


async def test_a_wrong_secret_is_refused_by_a_real_store(fresh_settings: FreshSettings) -> None:
    store = await object_store.connect(fresh_settings(CommonSettings, s3_secret_key="wrong"))
    try:
        for call in CALLS:
            with pytest.raises(StoreRefused) as caught:
                await call(store)
            assert caught.value.reason is ReasonCode.ACCESS_DENIED
    finally:
        await store.close()


async def test_a_closed_store_leaves_nothing_open() -> None:
    async with faulty_store(always(reply("200 OK", OBJECT_HEADERS, b"whole"))) as (store, _):
        await read_all(store)
    del store
    gc.collect()  # an unclosed session or connection would warn here, and warnings are errors
