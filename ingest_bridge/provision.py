"""Topics, buckets and their notification rules, made ahead of the services, so that none makes them in passing."""

from __future__ import annotations

from collections.abc import Callable

from infra import kafka, object_store
from infra.errors import StoreRefused
from infra.object_store.interface import ObjectStore
from infra.settings import CommonSettings, ProcessorSettings
from ingest_bridge.notification_rules import provision_rules
from schemas.events import ReasonCode
from schemas.topics import ALL_TOPICS


async def upgrade_step(settings: ProcessorSettings, say: Callable[[str], None]) -> None:
    """The bridge's part of `image-search upgrade`: see `provision`."""
    await provision(settings, say)


async def provision(settings: CommonSettings, say: Callable[[str], None], *, dry_run: bool = False) -> None:
    """Make what is missing and leave what is there. Raises StoreUnavailable, StoreRefused, ConfigurationError.

    A dry run changes nothing and shows how the notification rules would change.
    """
    if not dry_run:
        await _make_topics(settings, say)
    objects = await object_store.connect(settings)
    try:
        for bucket in settings.buckets:
            if not dry_run:
                await objects.ensure_bucket(bucket)
            elif await _is_missing(objects, bucket):
                say(f"the bucket {bucket} would be made")
                continue
            if settings.follow == "notifications" and settings.notification_arns:
                await provision_rules(objects, bucket, settings.notification_arns, say=say, dry_run=dry_run)
    finally:
        await objects.close()
    if not dry_run:
        say("buckets " + ", ".join(settings.buckets))


async def _make_topics(settings: CommonSettings, say: Callable[[str], None]) -> None:
    broker = await kafka.connect(settings)
    try:
        await broker.ensure_topics(ALL_TOPICS, partitions=settings.kafka_partitions, replication=settings.kafka_replication)
    finally:
        await broker.close()
    say("topics " + ", ".join(topic.full_name(settings.kafka_topic_prefix) for topic in ALL_TOPICS))


async def _is_missing(objects: ObjectStore, bucket: str) -> bool:
    try:
        await objects.check(bucket)
    except StoreRefused as error:
        if error.reason is ReasonCode.BUCKET_NOT_FOUND:
            return True
        raise
    return False
