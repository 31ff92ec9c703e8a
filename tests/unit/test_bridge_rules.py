"""What `provision` does to a bucket's notification rules."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from pydantic import ValidationError

from infra.errors import ConfigurationError, StoreRefused
from infra.object_store.interface import NotificationRule
from infra.object_store.memory import MemoryObjectStore, Operation
from infra.settings import CommonSettings
from ingest_bridge.notification_rules import plan_rules, provision_rules

DIRECT = "arn:minio:sqs::DIRECT:kafka"
STORED = "arn:minio:sqs::STORED:kafka"
TARGETS = (DIRECT, STORED)
ELSEWHERE = "arn:minio:sqs::ELSEWHERE:webhook"
FOREIGN = NotificationRule(ELSEWHERE, frozenset({"s3:ObjectCreated:Put"}), "theirs", prefix="logs/", suffix=".txt")
OURS = plan_rules("images", [], TARGETS).wanted


class World:
    def __init__(self, *present: NotificationRule) -> None:
        self.store = MemoryObjectStore("images", targets=(*TARGETS, ELSEWHERE))
        self.present = present
        self.said: list[str] = []
        self.writes = 0

    async def provision(self, *targets: str, dry_run: bool = False) -> list[NotificationRule]:
        await self.store.set_notification_rules("images", self.present)

        async def count(operation: Operation, _bucket: str, _key: str | None) -> None:
            self.writes += operation is Operation.SET_RULES

        self.store.before_call = count
        await provision_rules(self.store, "images", targets or TARGETS, say=self.said.append, dry_run=dry_run)
        return await self.store.notification_rules("images")


async def test_a_rule_for_each_target_without_filters_and_with_every_removal() -> None:
    world = World()
    rules = await world.provision()
    assert [rule.target for rule in rules] == [DIRECT, STORED]
    assert len({rule.rule_id for rule in rules}) == 2
    for rule in rules:
        assert rule.events == {"s3:ObjectCreated:*", "s3:ObjectRemoved:*", "s3:LifecycleDelMarkerExpiration:Delete"}
        assert (rule.prefix, rule.suffix) == ("", "")
    assert world.said[0].splitlines()[1].startswith("+ image-search-1: ")


async def test_other_rules_are_kept() -> None:
    assert await World(FOREIGN).provision() == [FOREIGN, *OURS]


async def test_nothing_is_written_when_nothing_changes() -> None:
    world = World(*OURS, FOREIGN)
    await world.provision()
    assert world.writes == 0
    assert world.said == ["notification rules of images: as they shall be"]


async def test_a_store_may_call_our_rules_by_another_name() -> None:
    world = World(*(replace(rule, rule_id=f"xyz{number}") for number, rule in enumerate(OURS)))
    await world.provision()
    assert world.writes == 0


async def test_a_rule_of_ours_that_is_out_of_date_is_replaced() -> None:
    old = replace(OURS[0], suffix=".jpg")
    world = World(old, FOREIGN)
    assert set(await world.provision()) == {*OURS, FOREIGN}
    lines = world.said[0].splitlines()
    assert [line[0] for line in lines[1:]] == ["-", "+", "+", " "]
    assert "(only suffix '.jpg')" in lines[1]
    assert "(only prefix 'logs/' and suffix '.txt')" in lines[4]


async def test_a_target_that_is_no_longer_wanted_loses_its_rule() -> None:
    assert {rule.target for rule in await World(*OURS, FOREIGN).provision(DIRECT)} == {DIRECT, ELSEWHERE}


async def test_a_dry_run_shows_and_changes_nothing() -> None:
    world = World(FOREIGN)
    assert await world.provision(dry_run=True) == [FOREIGN]
    assert world.writes == 0
    assert world.said[0].startswith("notification rules of images would change:")


async def test_a_target_that_the_store_does_not_know_is_a_matter_of_configuration() -> None:
    with pytest.raises(ConfigurationError, match=r"arn:minio:sqs::OTHER:kafka"):
        await World().provision("arn:minio:sqs::OTHER:kafka")


async def test_a_missing_bucket_is_no_matter_of_targets() -> None:
    with pytest.raises(StoreRefused, match="missing"):
        await provision_rules(MemoryObjectStore(), "images", TARGETS, say=print)


async def test_rustfs_names_expiry_in_its_own_way() -> None:
    (rule,) = plan_rules("images", [], ["arn:rustfs:sqs::NAME:kafka"]).wanted
    assert "s3:LifecycleExpiration:Delete" in rule.events
    assert "s3:LifecycleDelMarkerExpiration:Delete" not in rule.events


def test_planning_again_changes_nothing_whatever_was_there() -> None:
    stale = replace(OURS[1], events=frozenset({"s3:ObjectCreated:Put"}))
    for count in range(4):
        for present in itertools.permutations([FOREIGN, OURS[0], stale, replace(OURS[1], rule_id="")], count):
            first = plan_rules("images", present, TARGETS)
            assert not plan_rules("images", first.wanted, TARGETS).changes
            assert (FOREIGN in first.wanted) is (FOREIGN in present)
            assert {DIRECT, STORED} <= {rule.target for rule in first.wanted}


@pytest.mark.parametrize("arn", ["DIRECT", "arn:aws:sqs:eu-west-1:123456789012:images", "arn:minio:sqs::NAME"])
def test_only_targets_whose_rules_can_be_read_back_are_taken(arn: str) -> None:
    with pytest.raises(ValidationError):
        CommonSettings.model_validate({"notification_arns": arn})
