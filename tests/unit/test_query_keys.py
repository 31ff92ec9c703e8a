"""API keys: their form, how they are remembered, limited and marked as used."""

from __future__ import annotations

import re

import pytest

from infra.errors import StoreUnavailable
from infra.metadata_store.interface import ApiKey
from infra.metadata_store.memory import MemoryMetadataStore
from query_service import key_ring
from query_service.api_keys import NewKey, id_in, new_key, opens
from query_service.errors import RequestRefused
from query_service.key_ring import REMEMBERED_SECONDS, KeyRing
from schemas.access import Grant, Scope
from schemas.api import ErrorCode

GRANT = Grant.of([Scope.READ])


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def now_us(self) -> int:
        return round(self.seconds * 1_000_000)


class CountedStore(MemoryMetadataStore):
    def __init__(self, clock: Clock) -> None:
        super().__init__(clock.now_us)
        self.looked_up = 0
        self.away = False

    async def api_key(self, key_id: str) -> ApiKey | None:
        self.looked_up += 1
        return await super().api_key(key_id)

    async def note_api_key_uses(self, uses: object) -> None:
        if self.away:
            raise StoreUnavailable("metadata store", "away")
        await super().note_api_key_uses(uses)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> CountedStore:
    return CountedStore(clock)


@pytest.fixture
def ring(store: CountedStore, clock: Clock) -> KeyRing:
    return KeyRing(store, requests_per_second=2, burst=3, now_us=clock.now_us, clock=clock)


async def added(store: CountedStore, **changes: int) -> NewKey:
    made = new_key("test", GRANT, **changes)
    await store.add_api_key(made.stored)
    return made


async def refused(ring: KeyRing, text: str) -> RequestRefused:
    with pytest.raises(RequestRefused) as refusal:
        await ring.key(text)
    assert refusal.value.code is ErrorCode.UNAUTHORIZED
    return refusal.value


# -- form --------------------------------------------------------------------------------------------------------------
def test_a_key_has_an_id_to_show_and_256_bits_to_keep() -> None:
    made, other = new_key("a", GRANT), new_key("a", GRANT)
    found = re.fullmatch(r"isk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", made.text)
    assert found is not None and found[1] == made.stored.key_id == id_in(made.text)
    assert opens(made.text, made.stored) and not opens(other.text, made.stored)
    secret = found[2]
    assert secret not in repr(made) + str(made) + repr(made.stored)
    assert made.text.encode() not in made.stored.secret_hash


@pytest.mark.parametrize(
    "change", [str.upper, lambda key: key + " ", lambda key: key[:-1], lambda key: "x" + key, lambda key: ""]
)
def test_what_has_not_the_form_of_a_key_is_none(change: object) -> None:
    assert callable(change)
    assert id_in(change(new_key("a", GRANT).text)) is None


# -- the ring ----------------------------------------------------------------------------------------------------------
async def test_a_good_key_is_known_and_asked_for_once(store: CountedStore, ring: KeyRing) -> None:
    made = await added(store)
    for _ in range(5):
        assert (await ring.key(made.text)).key_id == made.stored.key_id
    assert store.looked_up == 1


async def test_all_that_is_wrong_is_refused_in_the_same_words(store: CountedStore, ring: KeyRing, clock: Clock) -> None:
    good, expired, revoked = await added(store), await added(store, expires_at_us=clock.now_us()), await added(store)
    await store.revoke_api_key(revoked.stored.key_id)
    wrong_secret = good.text[:-1] + ("A" if good.text[-1] != "A" else "B")
    unknown = new_key("never stored", GRANT).text
    wrongs = [expired.text, revoked.text, wrong_secret, unknown, "", "isk_", good.stored.key_id, good.text * 2]
    refusals = {(await refused(ring, text)).message for text in wrongs}
    assert len(refusals) == 1


async def test_a_revoked_key_is_refused_once_the_memory_of_it_is_old(store: CountedStore, ring: KeyRing, clock: Clock) -> None:
    made = await added(store)
    await ring.key(made.text)
    await store.revoke_api_key(made.stored.key_id)
    clock.seconds += REMEMBERED_SECONDS - 0.1
    assert await ring.is_good(made.stored.key_id)
    clock.seconds += 0.1
    await refused(ring, made.text)
    assert not await ring.is_good(made.stored.key_id)


async def test_a_key_expires_also_while_it_is_remembered(store: CountedStore, ring: KeyRing, clock: Clock) -> None:
    made = await added(store, expires_at_us=clock.now_us() + 1_000_000)
    await ring.key(made.text)
    clock.seconds += 1
    await refused(ring, made.text)


async def test_guessing_ids_does_not_grow_the_memory(
    store: CountedStore, ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_ring, "MOST_REMEMBERED", 10)
    for _ in range(50):
        await refused(ring, new_key("guess", GRANT).text)
    assert len(ring._remembered) == 10


async def test_each_key_has_a_burst_and_then_its_rate(store: CountedStore, ring: KeyRing, clock: Clock) -> None:
    for _ in range(3):
        ring.admit("one")
    with pytest.raises(RequestRefused) as refusal:
        ring.admit("one")
    assert (refusal.value.code, refusal.value.headers["Retry-After"]) == (ErrorCode.TOO_MANY_REQUESTS, "1")
    ring.admit("other")
    clock.seconds += 0.5
    ring.admit("one")
    with pytest.raises(RequestRefused):
        ring.admit("one")
    clock.seconds += 1000
    for _ in range(3):
        ring.admit("one")
    with pytest.raises(RequestRefused):
        ring.admit("one")


async def test_a_slow_rate_says_how_long_to_wait(store: CountedStore, clock: Clock) -> None:
    ring = KeyRing(store, requests_per_second=0.1, burst=1, now_us=clock.now_us, clock=clock)
    ring.admit("one")
    with pytest.raises(RequestRefused) as refusal:
        ring.admit("one")
    assert refusal.value.headers["Retry-After"] == "10"
    clock.seconds += 10
    ring.admit("one")


async def test_uses_are_written_later_and_not_lost_while_the_store_is_away(
    store: CountedStore, ring: KeyRing, clock: Clock
) -> None:
    made = await added(store)
    await ring.key(made.text)
    used_at = clock.now_us()
    assert [key.last_used_at_us for key in await store.api_keys()] == [None]
    store.away = True
    await ring.write_uses()
    store.away = False
    await ring.write_uses()
    assert [key.last_used_at_us for key in await store.api_keys()] == [used_at]


async def test_a_wrong_secret_is_no_use_of_the_key(store: CountedStore, ring: KeyRing) -> None:
    made = await added(store)
    await refused(ring, made.text[:-1] + ("A" if made.text[-1] != "A" else "B"))
    await ring.write_uses()
    assert [key.last_used_at_us for key in await store.api_keys()] == [None]
