"""Which key a request brings, how often it may ask, and when it was last used. Free of HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from infra.errors import StoreUnavailable
from infra.metadata_store.engine import now_us
from infra.metadata_store.interface import ApiKey, MetadataStore
from query_service.api_keys import id_in, opens
from query_service.errors import RequestRefused
from schemas.api import ErrorCode

REMEMBERED_SECONDS = 5.0
"""How long what the store said of a key is taken for true: the time until a revoked one is refused."""

MOST_REMEMBERED = 10_000
"""Ids that are no key's count too, so that guessing them cannot grow this."""

USES_WRITTEN_EVERY_SECONDS = 60.0
"""The last use is for people who tidy up: it is not worth a write a request."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class KeyRing:
    """Time is injected for tests."""

    def __init__(
        self,
        metadata: MetadataStore,
        *,
        requests_per_second: float,
        burst: int,
        now_us: Callable[[], int] = now_us,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metadata = metadata
        self._rate = requests_per_second
        self._burst = burst
        self._now_us = now_us
        self._clock = clock
        self._remembered: OrderedDict[str, tuple[float, ApiKey | None]] = OrderedDict()
        self._buckets: dict[str, _Bucket] = {}
        self._uses: dict[str, int] = {}

    async def key(self, text: str) -> ApiKey:
        """The good key that this is. Raises RequestRefused (UNAUTHORIZED), the same for all that is wrong; StoreUnavailable."""
        key_id = id_in(text)
        key = None if key_id is None else await self._look_up(key_id)
        if key is None or not opens(text, key) or not key.is_good_at(self._now_us()):
            raise unauthorized("This API key is not known, or it has expired or was revoked.")
        self._uses[key.key_id] = self._now_us()
        return key

    async def is_good(self, key_id: str) -> bool:
        """For who has shown it before, and is still here. Raises StoreUnavailable."""
        key = await self._look_up(key_id)
        return key is not None and key.is_good_at(self._now_us())

    def admit(self, key_id: str) -> None:
        """Counts a request. Raises RequestRefused (TOO_MANY_REQUESTS) when this key asks faster than it may."""
        now = self._clock()
        bucket = self._buckets.setdefault(key_id, _Bucket(self._burst, now))
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._rate)
        bucket.filled_at = now
        if bucket.tokens < 1:
            raise RequestRefused(
                ErrorCode.TOO_MANY_REQUESTS,
                f"This API key may ask {self._rate:g} times a second. Slow down.",
                retry_after_seconds=math.ceil((1 - bucket.tokens) / self._rate),
            )
        bucket.tokens -= 1

    async def run(self) -> None:
        """Write down uses, for ever."""
        while True:
            await asyncio.sleep(USES_WRITTEN_EVERY_SECONDS)
            await self.write_uses()

    async def write_uses(self) -> None:
        """What cannot be written now is tried again later: no request fails for it."""
        uses, self._uses = self._uses, {}
        try:
            await self._metadata.note_api_key_uses(uses)
        except StoreUnavailable as error:
            log.warning("key_uses_not_written", error=str(error))
            self._uses = {**uses, **self._uses}

    async def _look_up(self, key_id: str) -> ApiKey | None:
        remembered = self._remembered.get(key_id)
        if remembered is not None and self._clock() - remembered[0] < REMEMBERED_SECONDS:
            return remembered[1]
        asked_at = self._clock()
        key = await self._metadata.api_key(key_id)
        self._remembered[key_id] = (asked_at, key)
        self._remembered.move_to_end(key_id)
        if len(self._remembered) > MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        return key


def unauthorized(message: str) -> RequestRefused:
    return RequestRefused(ErrorCode.UNAUTHORIZED, message, headers={"WWW-Authenticate": 'Bearer realm="image-search"'})
