"""The object store over S3, through miniopy-async.

The client gets a plain aiohttp session of ours, for three reasons. Its own one retries through aiohttp-retry: five times
within some 25 ms, on 5xx only and never on connection errors, which hides a failing store and helps none that restarts. Its
own one has no total time-out, and a call takes none. And it inflates objects that were stored compressed, so that neither
size nor ETag would fit the bytes. Here a call is tried once (aiohttp itself repeats an idempotent request when a kept
connection turns out to be closed before any answer) and has one time-out around all of it.
"""

from __future__ import annotations

import asyncio
import io
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import aiohttp
import yarl
from miniopy_async.api import Minio
from miniopy_async.datatypes import Object
from miniopy_async.error import MinioException, S3Error, ServerError
from multidict import CIMultiDict

from infra.errors import ImageRejected, ImageSearchError, ObjectChanged, ObjectGone, StoreRefused
from infra.metrics import store_error
from infra.object_store.interface import NotificationRule, ObjectStat, ObjectStream, Over, StoredObject
from infra.object_store.names import check_bucket_name, check_place
from infra.object_store.rules import config_of, rules_of
from infra.object_store.sending import Source, condition_headers, etag_of_answer
from infra.settings import CommonSettings
from infra.tls import client_context
from schemas.events import ReasonCode
from schemas.identity import ObjectRef

STORE_NAME = "object store"
PAGE_SIZE = 1000
SIGNED_FOR = timedelta(minutes=5)
"""Checked by a store when a request begins, so it need not last as long as the body takes."""

_CODE = re.compile(r"[A-Za-z]{1,64}")
_CHANGED_CODES = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
_BUCKET_EXISTS_CODES = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})


class S3ObjectStore:
    """See ObjectStore. One of these a process: it holds the connections."""

    def __init__(self, client: Minio, public: Minio, session: aiohttp.ClientSession, *, timeout_seconds: float) -> None:
        """`public` signs addresses for others, who reach the store under another name, and sends nothing."""
        self._client, self._public = client, public
        self._session = session
        self._timeout_seconds = timeout_seconds
        self._buckets_put_to: set[str] = set()

    @classmethod
    def from_settings(cls, settings: CommonSettings) -> S3ObjectStore:
        """Needs a running event loop; sends nothing. Raises ConfigurationError for a CA file that cannot be used."""
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.s3_connections, ssl=trusted(settings)),
            # No total here: it would also end a stream that a slow reader is still taking. Calls have their own (_bounded).
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings.s3_timeout_seconds, sock_read=settings.s3_timeout_seconds
            ),
            auto_decompress=False,
            # A store may otherwise send a text object compressed on the way, and we would take that for its bytes.
            headers={"Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        client, public = (
            Minio(
                endpoint.netloc,
                access_key=settings.s3_access_key or None,
                secret_key=settings.s3_secret_key.get_secret_value() or None,
                secure=endpoint.scheme == "https",
                region=settings.s3_region,  # without it the first call of a bucket asks for its location, which needs a right
                session=session,
            )
            for endpoint in map(urlsplit, (settings.s3_endpoint, settings.s3_public_endpoint or settings.s3_endpoint))
        )
        return cls(client, public, session, timeout_seconds=settings.s3_timeout_seconds)

    async def read(self, ref: ObjectRef, *, max_bytes: int) -> StoredObject:
        check_place(ref)
        async with self._gone_confirmed(ref.bucket), self._bounded(), self._response(ref) as response:
            stat = _stat_of_response(ref, response)
            if stat.size > max_bytes:
                raise ImageRejected(ReasonCode.OBJECT_TOO_LARGE, f"{stat.size} bytes; the limit is {max_bytes}")
            # The size is what Content-Length says, and no more than that is ever handed on: this buffer is bounded.
            data = b"".join([chunk async for chunk in body_chunks(response, stat.size)])
        return StoredObject(stat, data)

    @asynccontextmanager
    async def open(self, ref: ObjectRef) -> AsyncIterator[ObjectStream]:
        check_place(ref)
        async with AsyncExitStack() as stack:
            async with self._gone_confirmed(ref.bucket), self._bounded():
                response = await stack.enter_async_context(self._response(ref))
                stat = _stat_of_response(ref, response)
            chunks = await stack.enter_async_context(aclosing(self._translated_chunks(response, stat.size)))
            yield ObjectStream(stat, chunks)

    async def presigned_url(self, ref: ObjectRef, *, seconds: int) -> str:
        check_place(ref)
        url: str = await self._public.get_presigned_url("GET", ref.bucket, ref.key, expires=timedelta(seconds=seconds))
        return url

    async def stat(self, ref: ObjectRef) -> ObjectStat:
        check_place(ref)
        async with self._gone_confirmed(ref.bucket), self._bounded():
            return _stat_of_object(ref.bucket, await self._client.stat_object(ref.bucket, ref.key))

    async def put(self, ref: ObjectRef, data: bytes, content_type: str = "application/octet-stream") -> ObjectStat:
        check_place(ref)
        await self._check_before_first_put(ref.bucket)
        async with self._bounded():
            written = await self._client.put_object(ref.bucket, ref.key, io.BytesIO(data), len(data), content_type)
            answered_at = parsedate_to_datetime(CIMultiDict(written.http_headers or {})["Date"])
        # A PUT is answered without Last-Modified, and the put time must be the one that stat, read and listings show.
        try:
            seen = await self.stat(ref)
        except ObjectGone:
            seen = None
        if seen is not None and seen.etag == written.etag:
            return seen
        # Overwritten or deleted meanwhile: still describe what was written here.
        return ObjectStat(ref, written.etag or "", _whole_second_us(answered_at), len(data), written.version_id, content_type)

    async def put_stream(
        self,
        ref: ObjectRef,
        chunks: AsyncIterator[bytes],
        *,
        size: int,
        content_type: str,
        within_seconds: float,
        over: Over | None = None,
    ) -> str:
        check_place(ref)
        await self._check_before_first_put(ref.bucket)
        if over is not None:
            # Not every store heeds the headers of a conditional put, and those that do should not be sent a body in vain.
            await self._check_present(ref, over)
        source = Source(chunks, size)
        headers = {"Content-Length": str(size), "Content-Type": content_type, **condition_headers(over)}
        try:
            async with self._bounded(within_seconds + self._timeout_seconds):
                # The client's own put holds a whole part in memory and hashes it. A signed address leaves the body to us.
                url = await self._client.get_presigned_url("PUT", ref.bucket, ref.key, expires=SIGNED_FOR)
                async with self._session.put(yarl.URL(url, encoded=True), data=source.chunks(), headers=headers) as response:
                    return await etag_of_answer(response)
        except ObjectGone:
            # MinIO's words for If-Match where nothing is: it went away after we looked.
            raise ObjectChanged("there is no object at this key any more") from None
        except ImageSearchError:
            # That the connection broke is what the library says of a sender that stopped.
            if source.failure is not None:
                raise source.failure from None
            raise

    async def _check_present(self, ref: ObjectRef, over: Over) -> None:
        try:
            present = (await self.stat(ref)).etag
        except ObjectGone:
            present = None
        if present != over.etag:
            raise ObjectChanged("another object is at this key")

    async def delete(self, ref: ObjectRef) -> None:
        check_place(ref)
        try:
            async with self._gone_confirmed(ref.bucket), self._bounded():
                await self._client.remove_object(ref.bucket, ref.key)
        except ObjectGone:
            return

    async def list_pages(
        self, bucket: str, *, prefix: str = "", start_after: str | None = None
    ) -> AsyncIterator[list[ObjectStat]]:
        check_bucket_name(bucket)
        objects = aiter(self._client.list_objects(bucket, prefix, recursive=True, start_after=start_after))
        full = True
        while full:
            page: list[ObjectStat] = []
            async with self._bounded():
                while len(page) < PAGE_SIZE and (item := await anext(objects, None)) is not None:
                    page.append(_stat_of_object(bucket, item))
            full = len(page) == PAGE_SIZE
            if page:
                yield page

    async def check(self, bucket: str) -> None:
        check_bucket_name(bucket)
        async with self._bounded():
            exists = await self._client.bucket_exists(bucket)
        if not exists:
            raise _bucket_missing(bucket)

    async def ensure_bucket(self, bucket: str) -> None:
        check_bucket_name(bucket)
        async with self._bounded():
            if await self._client.bucket_exists(bucket):
                return
            try:
                await self._client.make_bucket(bucket)
            except S3Error as error:
                if error.code not in _BUCKET_EXISTS_CODES:
                    raise
        # Somebody else was quicker: usable only if it answers us.
        await self.check(bucket)

    async def notification_rules(self, bucket: str) -> list[NotificationRule]:
        check_bucket_name(bucket)
        async with self._bounded():
            return rules_of(bucket, await self._client.get_bucket_notification(bucket))

    async def set_notification_rules(self, bucket: str, rules: Sequence[NotificationRule]) -> None:
        check_bucket_name(bucket)
        async with self._bounded():
            await self._client.set_bucket_notification(bucket, config_of(rules))

    async def close(self) -> None:
        await self._session.close()

    async def _check_before_first_put(self, bucket: str) -> None:
        # SeaweedFS makes a missing bucket on the first PUT of an administrator: a misspelt name would be filled, not refused.
        if bucket not in self._buckets_put_to:
            await self.check(bucket)
            self._buckets_put_to.add(bucket)

    @asynccontextmanager
    async def _response(self, ref: ObjectRef) -> AsyncIterator[aiohttp.ClientResponse]:
        response = await self._client.get_object(ref.bucket, ref.key)
        try:
            yield response
        finally:
            response.close()  # read to its end, its connection is back in the pool already; otherwise it cannot be used again

    @asynccontextmanager
    async def _gone_confirmed(self, bucket: str) -> AsyncIterator[None]:
        """Lets ObjectGone out only when the bucket answers.

        The answer to a HEAD has no body, so a missing bucket reads as a missing key, and everything in it would be deleted.
        """
        try:
            yield
        except ObjectGone:
            await self.check(bucket)
            raise

    @asynccontextmanager
    async def _bounded(self, timeout_seconds: float | None = None) -> AsyncIterator[None]:
        """One time-out around a call, and the library's errors as ours."""
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except ImageSearchError:
            raise
        except Exception as error:
            raise _translate(error, seconds) from error

    async def _translated_chunks(self, response: aiohttp.ClientResponse, size: int) -> AsyncGenerator[bytes]:
        # No total time-out: how long a stream takes is its reader's affair. A silent store is ended by the session's sock_read.
        try:
            async for chunk in body_chunks(response, size):
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise _translate(error, self._timeout_seconds) from error


def trusted(settings: CommonSettings) -> ssl.SSLContext | bool:
    """What aiohttp checks certificates by: True is what the system trusts."""
    if settings.s3_ca_file is None:
        return True
    return client_context(settings.s3_ca_file, named="IMAGE_SEARCH_S3_CA_FILE")


async def body_chunks(response: aiohttp.ClientResponse, size: int) -> AsyncIterator[bytes]:
    """Exactly `size` bytes, or StoreUnavailable: a body that was cut short must never pass for a whole object."""
    received = 0
    while chunk := await response.content.readany():
        received += len(chunk)
        if received > size:
            break
        yield chunk
    if received != size:
        raise store_error(STORE_NAME, f"a body ended after {received} of {size} bytes")


def _stat_of_response(ref: ObjectRef, response: aiohttp.ClientResponse) -> ObjectStat:
    headers = response.headers
    if "Content-Length" not in headers or "Last-Modified" not in headers or "ETag" not in headers:
        raise store_error(STORE_NAME, "an answer without Content-Length, Last-Modified or ETag is none of S3")
    return ObjectStat(
        ref,
        etag=headers["ETag"].replace('"', ""),
        put_time_us=_whole_second_us(parsedate_to_datetime(headers["Last-Modified"])),
        size=int(headers["Content-Length"]),
        version=headers.get("x-amz-version-id"),
        content_type=headers.get("Content-Type"),
    )


def _stat_of_object(bucket: str, item: Object) -> ObjectStat:
    if item.object_name is None or item.last_modified is None or item.etag is None or item.size is None:
        raise store_error(STORE_NAME, "a description without name, time, ETag or size is none of S3")
    return ObjectStat(
        ObjectRef(bucket, item.object_name),
        etag=item.etag,
        put_time_us=_whole_second_us(item.last_modified),
        size=item.size,
        version=item.version_id,
        content_type=item.content_type,
    )


def _whole_second_us(moment: datetime) -> int:
    """Microseconds, floored to the second.

    Listings carry milliseconds and headers whole seconds. With different values for one object, etag and put time of an event
    would not equal those of a row, and every scan would take every object for changed.
    """
    return int(moment.timestamp()) * 1_000_000


def _translate(error: Exception, timeout_seconds: float) -> ImageSearchError:
    match error:
        case S3Error():
            return _translate_s3(error)
        case ServerError():
            return store_error(STORE_NAME, f"HTTP {error.status_code}")
        case TimeoutError():
            return store_error(STORE_NAME, f"no answer within {timeout_seconds:g} s")
        case aiohttp.ClientConnectorCertificateError():
            return store_error(STORE_NAME, "its certificate is of another CA (IMAGE_SEARCH_S3_CA_FILE) or for another host")
        case aiohttp.ClientError() | OSError():
            return store_error(STORE_NAME, f"the connection failed ({type(error).__name__})")
        case MinioException() | ParseError() | ValueError() | KeyError():
            return store_error(STORE_NAME, f"an answer that is none of S3 ({type(error).__name__})")
        case _:
            raise error


def _translate_s3(error: S3Error) -> ImageSearchError:
    status = error.response.status
    # The code is text from outside: only a plain word of it may reach a person.
    code = error.code if error.code and _CODE.fullmatch(error.code) else ""
    if code == "NoSuchKey" and status == 404:
        return ObjectGone("there is no object at this key")
    if status == 412 or code in _CHANGED_CODES:
        return ObjectChanged("another object is at this key")
    if code == "NoSuchBucket":
        return StoreRefused(ReasonCode.BUCKET_NOT_FOUND, "the bucket is missing: make it, or correct the setting `buckets`")
    if status in (401, 403):
        return StoreRefused(
            ReasonCode.ACCESS_DENIED,
            f"the object store denies access ({code or status}): check access key, secret key, policy and clock",
        )
    if 400 <= status < 500 and status not in (404, 408, 429):
        return StoreRefused(ReasonCode.OBJECT_UNREADABLE, f"the object store refuses the request ({code or status})")
    return store_error(STORE_NAME, f"HTTP {status} {code}".rstrip())


def _bucket_missing(bucket: str) -> StoreRefused:
    return StoreRefused(
        ReasonCode.BUCKET_NOT_FOUND, f"the bucket {bucket!r} is missing: make it, or correct the setting `buckets`"
    )
