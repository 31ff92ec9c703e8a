"""What `provision` does to a bucket's notification rules: ours are set, those of others kept, nothing written in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infra.errors import ConfigurationError, StoreRefused
from infra.object_store.interface import NotificationRule, ObjectStore
from schemas.events import ReasonCode

RULE_ID_PREFIX = "image-search-"
"""A rule of this name is ours: it may be replaced."""

_CHANGES = frozenset({"s3:ObjectCreated:*", "s3:ObjectRemoved:*"})
# Removals that `ObjectRemoved:*` leaves out, and that each store names in its own way: an unknown name is refused.
_MORE_REMOVALS = {
    "minio": frozenset({"s3:LifecycleDelMarkerExpiration:Delete"}),
    "rustfs": frozenset({"s3:LifecycleExpiration:Delete", "s3:LifecycleExpiration:DeleteMarkerCreated"}),
}


@dataclass(frozen=True, slots=True)
class RulePlan:
    """How a bucket's rules are, and how they shall be."""

    bucket: str
    present: tuple[NotificationRule, ...]
    wanted: tuple[NotificationRule, ...]

    @property
    def added(self) -> list[NotificationRule]:
        return [rule for rule in self.wanted if rule not in self.present]

    @property
    def removed(self) -> list[NotificationRule]:
        return [rule for rule in self.present if rule not in self.wanted]

    @property
    def changes(self) -> bool:
        return bool(self.added or self.removed)

    def lines(self) -> list[str]:
        """The difference, for people: `-` goes, `+` comes, the rest stays."""
        kept = [rule for rule in self.present if rule in self.wanted]
        marked = (("-", self.removed), ("+", self.added), (" ", kept))
        return [f"{mark} {_described(rule)}" for mark, rules in marked for rule in rules]


def plan_rules(bucket: str, present: Sequence[NotificationRule], targets: Sequence[str]) -> RulePlan:
    """No filter by suffix or prefix: filters see case (`.jpg` misses `.JPG`), and the content decides what is a picture."""
    ours = [
        NotificationRule(target, _CHANGES | _MORE_REMOVALS[target.split(":")[1]], rule_id=f"{RULE_ID_PREFIX}{number}")
        for number, target in enumerate(targets, 1)
    ]
    kept = [rule for rule in present if not rule.rule_id.startswith(RULE_ID_PREFIX) or _any_same(rule, ours)]
    missing = [rule for rule in ours if not _any_same(rule, kept)]
    return RulePlan(bucket, tuple(present), (*kept, *missing))


async def provision_rules(
    objects: ObjectStore, bucket: str, targets: Sequence[str], *, say: Callable[[str], None], dry_run: bool = False
) -> None:
    """Raises StoreUnavailable, StoreRefused; ConfigurationError if the store does not know a target."""
    plan = plan_rules(bucket, await objects.notification_rules(bucket), targets)
    if not plan.changes:
        say(f"notification rules of {bucket}: as they shall be")
        return
    say("\n".join([f"notification rules of {bucket}{' would change' if dry_run else ''}:", *plan.lines()]))
    if dry_run:
        return
    try:
        await objects.set_notification_rules(bucket, plan.wanted)
    except StoreRefused as error:
        if error.reason is not ReasonCode.OBJECT_UNREADABLE:
            raise
        raise ConfigurationError(
            f"{error}: it may not know a target of IMAGE_SEARCH_NOTIFICATION_ARNS ({', '.join(targets)}), "
            "or one of them could not start: see its log"
        ) from None


def _any_same(rule: NotificationRule, others: Sequence[NotificationRule]) -> bool:
    return any(rule.says_the_same(other) for other in others)


def _described(rule: NotificationRule) -> str:
    name = f"{rule.rule_id}: " if rule.rule_id else ""
    only = [f"{what} {value!r}" for what, value in (("prefix", rule.prefix), ("suffix", rule.suffix)) if value]
    return f"{name}{', '.join(sorted(rule.events))} to {rule.target}" + (f" (only {' and '.join(only)})" if only else "")
