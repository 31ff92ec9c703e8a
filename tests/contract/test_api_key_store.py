"""Keys of the HTTP API, over the metadata store and its twin."""

from __future__ import annotations

import hashlib

import pytest

from infra.metadata_store import MetadataStore
from infra.metadata_store.interface import ApiKey
from schemas.access import Grant, Scope, place_from_text
from tests.contract.test_metadata_store import Stores, database_url, store, stores

__all__ = ["database_url", "store", "stores"]

NARROW = Grant.of([Scope.READ, Scope.SEARCH], [place_from_text("images/ä b/%_"), place_from_text("other")])


def key_of(key_id: str, grant: Grant = NARROW, **changes: int) -> ApiKey:
    return ApiKey(key_id, hashlib.sha256(key_id.encode()).digest(), f"name of {key_id} ✓", grant, **changes)


async def test_a_key_comes_back_as_it_was_added(stores: Stores) -> None:
    stores.clock.now_us = 7_000_000
    added = await stores.store.add_api_key(key_of("aaaaaaaaaaaa", expires_at_us=9_000_000))
    assert added.created_at_us == 7_000_000
    assert await stores.another().api_key("aaaaaaaaaaaa") == added
    assert added.grant == NARROW


async def test_a_key_that_there_is_not_is_none(store: MetadataStore) -> None:
    await store.add_api_key(key_of("aaaaaaaaaaaa"))
    for key_id in ("bbbbbbbbbbbb", "AAAAAAAAAAAA", "aaaaaaaaaaaa ", ""):
        assert await store.api_key(key_id) is None


async def test_keys_are_listed_oldest_first(stores: Stores) -> None:
    for key_id in ("cccccccccccc", "aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        stores.clock.now_us += 1
        await stores.store.add_api_key(key_of(key_id, Grant.of([Scope.ADMIN])))
    assert [key.key_id for key in await stores.store.api_keys()] == ["cccccccccccc", "aaaaaaaaaaaa", "bbbbbbbbbbbb"]


async def test_a_revoked_key_stays_and_keeps_its_first_time(stores: Stores) -> None:
    await stores.store.add_api_key(key_of("aaaaaaaaaaaa"))
    await stores.store.add_api_key(key_of("bbbbbbbbbbbb"))
    stores.clock.now_us = 5_000_000
    assert await stores.store.revoke_api_key("aaaaaaaaaaaa")
    stores.clock.now_us = 6_000_000
    assert await stores.store.revoke_api_key("aaaaaaaaaaaa")
    revoked, other = await stores.another().api_key("aaaaaaaaaaaa"), await stores.store.api_key("bbbbbbbbbbbb")
    assert revoked is not None and other is not None
    assert (revoked.revoked_at_us, other.revoked_at_us) == (5_000_000, None)
    assert not await stores.store.revoke_api_key("cccccccccccc")


async def test_the_last_use_only_moves_on(store: MetadataStore) -> None:
    for key_id in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        await store.add_api_key(key_of(key_id))
    await store.note_api_key_uses({"aaaaaaaaaaaa": 50, "gone": 60})
    await store.note_api_key_uses({"aaaaaaaaaaaa": 40})
    await store.note_api_key_uses({})
    used = {key.key_id: key.last_used_at_us for key in await store.api_keys()}
    assert used == {"aaaaaaaaaaaa": 50, "bbbbbbbbbbbb": None}


@pytest.mark.parametrize(
    ("key", "now_us", "good"),
    [
        (key_of("a"), 10, True),
        (key_of("a", expires_at_us=10), 9, True),
        (key_of("a", expires_at_us=10), 10, False),
        (key_of("a", revoked_at_us=1), 10, False),
        (key_of("a", revoked_at_us=20), 10, False),
    ],
)
def test_a_key_is_good_until_it_expires_or_is_revoked(key: ApiKey, now_us: int, good: bool) -> None:
    assert key.is_good_at(now_us) is good
