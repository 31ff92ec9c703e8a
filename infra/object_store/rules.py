"""A bucket's notification rules in the S3 client's own form, and back."""

from __future__ import annotations

from collections.abc import Sequence

from miniopy_async.notificationconfig import NotificationConfig, PrefixFilterRule, QueueConfig, SuffixFilterRule

from infra.errors import StoreRefused
from infra.object_store.interface import NotificationRule
from schemas.events import ReasonCode


def rules_of(bucket: str, config: NotificationConfig) -> list[NotificationRule]:
    """Raises StoreRefused for rules that would be lost by writing back what was read."""
    if config.topic_config_list or config.cloud_func_config_list:
        raise StoreRefused(
            ReasonCode.OBJECT_UNREADABLE,
            f"the bucket {bucket!r} has notification rules to topics or functions: they are not touched; set its rules by hand",
        )
    return [
        NotificationRule(
            target=one.queue,
            events=frozenset(one.events),
            rule_id=one.config_id or "",
            prefix=one.prefix_filter_rule.value if one.prefix_filter_rule else "",
            suffix=one.suffix_filter_rule.value if one.suffix_filter_rule else "",
        )
        for one in config.queue_config_list or []
    ]


def config_of(rules: Sequence[NotificationRule]) -> NotificationConfig:
    return NotificationConfig(
        queue_config_list=[
            QueueConfig(
                rule.target,
                sorted(rule.events),
                config_id=rule.rule_id or None,
                prefix_filter_rule=PrefixFilterRule(rule.prefix) if rule.prefix else None,
                suffix_filter_rule=SuffixFilterRule(rule.suffix) if rule.suffix else None,
            )
            for rule in rules
        ]
    )
