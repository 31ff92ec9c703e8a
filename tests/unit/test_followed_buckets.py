"""Which buckets are followed: added and taken away, and what each part that looks at buckets makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from infra import metadata_store, object_store, vector_store
from infra.errors import ConfigurationError, StoreRefused, StoreUnavailable
from infra.followed_buckets import followed_buckets
from infra.metadata_store import MemoryMetadataStore
from infra.object_store.interface import NotificationRule
from infra.object_store.memory import MemoryObjectStore, Operation
from infra.settings import BridgeSettings, CommonSettings
from infra.vector_store import MemoryVectorStore
from infra.verify import FindingKind, verify, verify_stores
from ingest_bridge import service
from ingest_bridge.provision import follow_bucket, unfollow_bucket
from schemas.events import ReasonCode
from schemas.identity import ObjectRef

TARGET = "arn:minio:sqs::DIRECT:kafka"
FOREIGN = NotificationRule("arn:minio:sqs::ELSEWHERE:webhook", frozenset({"s3:ObjectCreated:Put"}), "theirs")


class World:
    """The twins, as whatever connects finds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects = MemoryObjectStore("images", targets=(TARGET, FOREIGN.target))
        self.metadata = MemoryMetadataStore()
        self.vectors = MemoryVectorStore()
        self.said: list[str] = []
        for module, twin in ((object_store, self.objects), (metadata_store, self.metadata), (vector_store, self.vectors)):
            monkeypatch.setattr(module, "connect", _returning(twin))

    async def add(self, bucket: str, **settings: object) -> None:
        await follow_bucket(settings_of(**settings), bucket, self.said.append)

    async def remove(self, bucket: str, **settings: object) -> None:
        await unfollow_bucket(settings_of(**settings), bucket, self.said.append)

    async def followed(self) -> tuple[str, ...]:
        return await followed_buckets(settings_of(), self.metadata)

    def fail(self, operation: Operation, error: Exception) -> None:
        async def fail(called: Operation, _bucket: str, _key: str | None) -> None:
            if called is operation:
                raise error

        self.objects.before_call = fail


def _returning(twin: object) -> Callable[[CommonSettings], object]:
    async def connect(_settings: CommonSettings) -> object:
        return twin

    return connect


def settings_of(**settings: object) -> CommonSettings:
    rules = {"follow": "notifications", "notification_arns": TARGET}
    return CommonSettings.model_validate({"buckets": "images", **rules, **settings})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


# -- the list --------------------------------------------------------------------------------------------------------------
async def test_the_settings_come_first_and_none_comes_twice(world: World) -> None:
    for bucket in ("z-last", "a-first", "images"):
        await world.metadata.add_bucket(bucket)
    assert await world.followed() == ("images", "a-first", "z-last")


async def test_an_added_bucket_is_made_and_gets_its_rules(world: World) -> None:
    await world.add("holiday")
    assert await world.followed() == ("images", "holiday")
    assert [rule.target for rule in await world.objects.notification_rules("holiday")] == [TARGET]


async def test_rules_are_left_alone_where_changes_are_heard_of_in_another_way(world: World) -> None:
    await world.add("holiday", follow="seaweedfs")
    assert await world.objects.notification_rules("holiday") == []
    assert world.said == []


async def test_who_sets_rules_by_hand_is_told_to(world: World) -> None:
    await world.add("holiday", notification_arns="")
    assert "have the store announce the changes of holiday" in world.said[-1]


@pytest.mark.parametrize("name", ["", "A", "Upper-Case", "under_score", "-end", "x" * 64, "dots..twice", "127.0.0.1"])
async def test_what_can_be_no_bucket_is_not_followed(world: World, name: str) -> None:
    with pytest.raises(StoreRefused, match="no bucket name"):
        await world.add(name)
    assert await world.followed() == ("images",)


async def test_a_bucket_whose_rules_cannot_be_set_is_not_followed(world: World) -> None:
    with pytest.raises(ConfigurationError, match="NOTIFICATION_ARNS"):
        await world.add("holiday", notification_arns="arn:minio:sqs::UNKNOWN:kafka")
    assert await world.followed() == ("images",)


async def test_a_bucket_that_is_taken_away_loses_our_rules_and_keeps_its_objects(world: World) -> None:
    await world.objects.ensure_bucket("holiday")
    await world.objects.set_notification_rules("holiday", [FOREIGN])
    await world.add("holiday")
    await world.objects.put(ObjectRef("holiday", "a.jpg"), b"a")
    await world.remove("holiday")
    assert await world.followed() == ("images",)
    assert await world.objects.notification_rules("holiday") == [FOREIGN]
    assert (await world.objects.stat(ObjectRef("holiday", "a.jpg"))).size == 1


async def test_a_bucket_that_is_gone_or_denied_can_be_taken_away(world: World) -> None:
    await world.add("holiday")
    world.fail(Operation.RULES, StoreRefused(ReasonCode.BUCKET_NOT_FOUND, "the bucket 'holiday' is missing: make it"))
    await world.remove("holiday")
    assert await world.followed() == ("images",)
    assert "stay as they are" in world.said[-1]


async def test_a_store_that_is_away_leaves_the_bucket_for_another_try(world: World) -> None:
    await world.add("holiday")
    world.fail(Operation.RULES, StoreUnavailable("object store", "away"))
    with pytest.raises(StoreUnavailable):
        await world.remove("holiday")
    assert await world.followed() == ("images", "holiday")


async def test_what_the_settings_name_is_not_taken_away(world: World) -> None:
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_BUCKETS"):
        await world.remove("images")
    await world.add("images")
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_BUCKETS"):
        await world.remove("images")
    assert await world.followed() == ("images",)
    assert [rule.target for rule in await world.objects.notification_rules("images")] == [TARGET]
    with pytest.raises(ConfigurationError, match="not among the added"):
        await world.remove("elsewhere")


# -- who looks at it -------------------------------------------------------------------------------------------------------
async def test_verify_looks_into_added_buckets(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.verify.verify_stores", partial(verify_stores, grace_seconds=0.0))
    await world.add("holiday")
    await world.objects.put(ObjectRef("holiday", "a.jpg"), b"a")
    report = await verify(settings_of())
    assert [finding.bucket for finding in report.findings[FindingKind.MISSING].listed] == ["holiday"]
    await world.remove("holiday")
    assert (await verify(settings_of())).clean


class BridgeParts:
    """Stands for the bridge's parts: `made` is for which buckets, `watching` is the watch of the ones that run now."""

    def __init__(self, world: World, settings: BridgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.settings = world, settings
        self.made: list[tuple[str, ...]] = []
        self.ended = 0
        self.died = asyncio.Event()
        monkeypatch.setattr(service, "_parts", self.parts)

    @asynccontextmanager
    async def parts(self, settings: BridgeSettings) -> AsyncIterator[dict[str, service.Part]]:
        followed = await followed_buckets(settings, self.world.metadata)
        self.made.append(followed)
        watch = partial(service.until_buckets_change, settings, self.world.metadata, followed)
        yield {service.BUCKET_WATCH: watch, "another": self.another}
        self.ended += 1

    async def another(self) -> None:
        await self.died.wait()
        raise ValueError("a part died")

    async def until_made(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.made) < times:
                await asyncio.sleep(0)


async def test_the_bridge_begins_anew_when_a_bucket_comes_or_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BridgeSettings.model_validate({"buckets": "images", "bucket_poll_seconds": 1e-9})
    bridge = BridgeParts(world, settings, monkeypatch)
    serving = asyncio.create_task(service.serve(settings))
    await bridge.until_made(1)
    await world.metadata.add_bucket("holiday")
    await bridge.until_made(2)
    await world.metadata.remove_bucket("holiday")
    await bridge.until_made(3)
    assert bridge.made == [("images",), ("images", "holiday"), ("images",)]
    assert bridge.ended == 2
    bridge.died.set()
    with pytest.raises(ValueError, match="a part died"):
        await serving


async def test_a_database_that_is_away_changes_no_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BridgeSettings.model_validate({"buckets": "images", "bucket_poll_seconds": 1e-9})
    asked = 0
    answer = world.metadata.added_buckets

    async def away_twice() -> list[str]:
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise StoreUnavailable("database", "away")
        return await answer()

    monkeypatch.setattr(world.metadata, "added_buckets", away_twice)
    watching = asyncio.create_task(service.until_buckets_change(settings, world.metadata, ("images",)))
    async with asyncio.timeout(10):
        while asked < 5:
            await asyncio.sleep(0)
        assert not watching.done()
        await world.metadata.add_bucket("holiday")
        await watching
