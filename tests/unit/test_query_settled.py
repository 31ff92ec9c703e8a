"""Reading one's own writes: which states of row and bucket a token is satisfied by, and which it waits for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from query_service.errors import RequestRefused
from query_service.settled import LONGEST_WAIT_SECONDS, Settling
from schemas.api import ErrorCode, WaitToken
from schemas.identity import ObjectRef
from schemas.tables import RowState
from tests.query_world import BUCKET, QueryWorld, picture

REF = ObjectRef(BUCKET, "a.jpg")
TIMEOUT_SECONDS = 10.0

Step = Callable[[], Awaitable[object]]


class Time:
    """Sleeping moves the clock; after a given time something happens."""

    def __init__(self, then: Step | None = None, after_seconds: float = 1.0) -> None:
        self.seconds = 0.0
        self.pauses: list[float] = []
        self._then, self._after = then, after_seconds

    def now(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.seconds += seconds
        if self._then is not None and self.seconds >= self._after:
            then, self._then = self._then, None
            await then()


@pytest.fixture
async def world() -> QueryWorld:
    return await QueryWorld().start()


async def wait(world: QueryWorld, etag: str | None, time: Time | None = None) -> Time:
    time = time or Time()
    settling = Settling(world.metadata, world.objects, TIMEOUT_SECONDS, now=time.now, sleep=time.sleep)
    await settling.wait(WaitToken(REF.object_id, etag))
    return time


async def times_out(world: QueryWorld, etag: str | None) -> None:
    time = Time()
    with pytest.raises(RequestRefused) as refused:
        await wait(world, etag, time)
    assert refused.value.code is ErrorCode.WAIT_TIMEOUT
    assert TIMEOUT_SECONDS - LONGEST_WAIT_SECONDS <= time.seconds <= TIMEOUT_SECONDS
    assert max(time.pauses) == LONGEST_WAIT_SECONDS


@pytest.mark.parametrize("state", [RowState.INDEXED, RowState.FAILED, RowState.IGNORED])
async def test_a_row_with_this_etag_is_settled_whatever_became_of_it(world: QueryWorld, state: RowState) -> None:
    await world.set_row(REF, picture(1), state=state, etag="e1")
    assert (await wait(world, "e1")).pauses == []


async def test_it_waits_for_the_row(world: QueryWorld) -> None:
    time = await wait(world, "e1", Time(lambda: world.set_row(REF, picture(1), etag="e1")))
    assert 1.0 <= time.seconds < 1.2
    assert time.pauses[:3] == [0.01, 0.02, 0.04]


async def test_an_older_row_is_not_enough(world: QueryWorld) -> None:
    await world.set_row(REF, picture(1), etag="e0")
    put = await world.objects.put(REF, picture(2))
    await times_out(world, put.etag)


async def test_no_row_is_not_enough_for_a_put(world: QueryWorld) -> None:
    await times_out(world, "e1")


async def test_an_overwrite_that_row_and_bucket_agree_on_is_newer(world: QueryWorld) -> None:
    put = await world.objects.put(REF, picture(3))
    await world.set_row(REF, picture(3), etag=put.etag)
    assert (await wait(world, "overwritten-before-it-was-seen")).seconds < 1.0


async def test_a_deletion_that_row_and_bucket_agree_on_is_newer_than_the_put(world: QueryWorld) -> None:
    await world.set_row(REF, picture(1), state=RowState.DELETED, etag="e1")
    assert (await wait(world, "e1")).seconds < 1.0


async def test_a_put_after_a_deletion_waits_although_the_old_row_has_its_etag(world: QueryWorld) -> None:
    put = await world.objects.put(REF, picture(1))
    await world.set_row(REF, picture(1), state=RowState.DELETED, etag=put.etag)
    await times_out(world, put.etag)


async def test_deleted_is_satisfied_by_no_row_and_by_a_deleted_one(world: QueryWorld) -> None:
    assert (await wait(world, None)).pauses == []
    await world.set_row(REF, picture(1), state=RowState.DELETED)
    assert (await wait(world, None)).pauses == []


async def test_deleted_waits_for_a_row_that_still_stands(world: QueryWorld) -> None:
    await world.set_row(REF, picture(1), etag="e1")
    await times_out(world, None)


async def test_a_put_after_the_deletion_is_newer(world: QueryWorld) -> None:
    put = await world.objects.put(REF, picture(1))
    await world.set_row(REF, picture(1), etag=put.etag)
    assert (await wait(world, None)).seconds < 1.0


@pytest.mark.parametrize(
    "text", ["", ":", "ab:etag", f"{'a' * 64}", f"{'a' * 64}:", f"{'A' * 64}:e", f"{'g' * 64}:e", f"{'a' * 64}:a b"]
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(ValueError, match="wait_for is"):
        WaitToken.parse(text)


def test_tokens_come_back_and_quotes_around_an_etag_go() -> None:
    for etag in ("0123abc", "0123abc-7", None):
        token = WaitToken(REF.object_id, etag)
        assert WaitToken.parse(str(token)) == token
    assert WaitToken.parse(f'{REF.object_id.hex()}:"e1"').etag == "e1"
