"""Notifications by webhook, for stores that can only call: the answer says "taken" when the broker has the events, not before.

A store that is answered with anything but 2xx calls again, or gives up: neither loses a change for good, since scans find it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence

import structlog
from aiohttp import hdrs, web

from infra.errors import InvalidEvent
from infra.kafka.interface import Producer
from infra.metrics import WEBHOOK_REQUESTS
from ingest_bridge.announcing import Source
from ingest_bridge.notifications.s3 import parse_message
from ingest_bridge.relay import count_records, write_events

log = structlog.get_logger(__name__)

PATH = "/notifications"
RETRY_AFTER_SECONDS = 5


class Receiver:
    """`POST /notifications` with `Authorization: Bearer <secret>`, one message of an S3 store a request.

    Answers 204 when the broker has the events; 400 for what is no notification, 401 without the secret, 408 for a body that
    does not come in time, 413 for a large one, 503 while the broker is away. `on_gap` is called for what could not be read:
    it may have been a change.
    """

    def __init__(
        self,
        *,
        secret: str,
        deployment: str,
        buckets: Sequence[str],
        producer: Producer,
        on_gap: Callable[[], None],
        body_bytes: int,
        timeout_seconds: float,
    ) -> None:
        if not secret:
            raise ValueError("a receiver without a secret would take anything from anybody")
        self._authorization = f"Bearer {secret}".encode()
        self._deployment = deployment
        self._buckets = frozenset(buckets)
        self._producer = producer
        self._on_gap = on_gap
        self._body_bytes = body_bytes
        self._timeout_seconds = timeout_seconds

    def route(self) -> web.RouteDef:
        return web.post(PATH, self._handle)

    async def _handle(self, request: web.Request) -> web.Response:
        response = await self._answer(request)
        WEBHOOK_REQUESTS.labels(str(response.status)).inc()
        return response

    async def _answer(self, request: web.Request) -> web.Response:
        given = request.headers.get(hdrs.AUTHORIZATION, "").encode("utf-8", "surrogateescape")
        # Byte by byte a comparison would tell by its time how much of a guess is right.
        if not hmac.compare_digest(given, self._authorization):
            return _refusal(401, "the secret is missing or wrong", {hdrs.WWW_AUTHENTICATE: "Bearer"})
        try:
            async with asyncio.timeout(self._timeout_seconds):
                body = await self._body(request)
        except TimeoutError:
            return _refusal(408, f"the body did not come within {self._timeout_seconds:g} s")
        except web.RequestPayloadError:
            return _refusal(400, "the body is broken")
        if body is None:
            return _refusal(413, f"more than {self._body_bytes} bytes")
        return await self._take(body)

    async def _body(self, request: web.Request) -> bytes | None:
        """None for more than is taken. Counted as it comes, inflated: a length that is told may be wrong."""
        parts: list[bytes] = []
        left = self._body_bytes
        async for part in request.content.iter_any():
            left -= len(part)
            if left < 0:
                return None
            parts.append(part)
        return b"".join(parts)

    async def _take(self, body: bytes) -> web.Response:
        try:
            parsed = parse_message(body, deployment=self._deployment, buckets=self._buckets)
        except InvalidEvent as error:
            log.warning("a webhook brought what is no notification", reason=error.reason, error=str(error))
            self._on_gap()
            return _refusal(400, f"this is no notification of an S3 store: {error}")
        try:
            if parsed.events:
                async with asyncio.timeout(self._timeout_seconds):
                    await write_events(self._producer, parsed.events, Source.WEBHOOK)
        except TimeoutError:
            return _refusal(503, "the broker does not answer: send it again", {hdrs.RETRY_AFTER: str(RETRY_AFTER_SECONDS)})
        count_records(parsed)
        return web.Response(status=204)


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    # What is left of a body that was not read would be taken for the next request.
    response = web.json_response({"error": message}, status=status, headers=headers)
    response.force_close()
    return response
