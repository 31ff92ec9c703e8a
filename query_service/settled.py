"""Reading one's own writes: wait until a state of an object, named by a token, has been worked on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from infra.errors import ObjectGone
from infra.metadata_store.interface import ImageRow, MetadataStore
from infra.object_store.interface import ObjectStore
from query_service.errors import RequestRefused
from schemas.access import EVERYTHING, Grant
from schemas.api import ErrorCode, WaitToken
from schemas.tables import RowState

FIRST_WAIT_SECONDS = 0.01
LONGEST_WAIT_SECONDS = 0.1
LOOK_INTO_BUCKET_SECONDS = 0.5
"""Between looks into the bucket, for a state that something newer has replaced: rare, so it need not be quick."""


@dataclass(frozen=True, slots=True)
class Settling:
    """`wait` returns when the token's state, or a newer one, is what searches show. Time is injected for tests."""

    metadata: MetadataStore
    objects: ObjectStore
    timeout_seconds: float
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def wait(self, token: WaitToken, grant: Grant = EVERYTHING) -> None:
        """What the grant does not hold is waited for as if it were not there.

        Raises RequestRefused (WAIT_TIMEOUT), StoreUnavailable, StoreRefused.
        """
        deadline = self.now() + self.timeout_seconds
        next_look = self.now()
        pause = FIRST_WAIT_SECONDS
        while True:
            row = (await self.metadata.rows([token.object_id])).get(token.object_id)
            if row is not None and not grant.holds(row.ref):
                row = None
            if _is_settled(row, token):
                return
            if row is not None and self.now() >= next_look:
                if await self._agrees_with_bucket(row):
                    return
                next_look = self.now() + LOOK_INTO_BUCKET_SECONDS
            if self.now() + pause > deadline:
                raise RequestRefused(
                    ErrorCode.WAIT_TIMEOUT,
                    f"The object did not reach this state within {self.timeout_seconds:g} s. Try again, or look at it.",
                    details={"wait_for": str(token), "state": None if row is None else row.state},
                )
            await self.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT_SECONDS)

    async def _agrees_with_bucket(self, row: ImageRow) -> bool:
        """True when the row shows the bucket's present state.

        The token's state was in the bucket before the token was made, and the bucket shows its last state to everyone:
        if row and bucket agree on another one, that one is newer.
        """
        try:
            stat = await self.objects.stat(row.ref)
        except ObjectGone:
            return row.state is RowState.DELETED
        return row.state is not RowState.DELETED and row.etag == stat.etag


def _is_settled(row: ImageRow | None, token: WaitToken) -> bool:
    if token.etag is None:
        return row is None or row.state is RowState.DELETED
    return row is not None and row.state is not RowState.DELETED and row.etag == token.etag
