"""Topics, buckets and their notification rules, made ahead of the services, so that none makes them in passing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from infra import kafka, metadata_store, object_store
from infra.errors import ConfigurationError, StoreRefused
from infra.followed_buckets import followed_buckets
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
    objects, metadata = await object_store.connect(settings), await metadata_store.connect(settings)
    try:
        buckets = await followed_buckets(settings, metadata)
        for bucket in buckets:
            if not dry_run:
                await objects.ensure_bucket(bucket)
            elif await _is_missing(objects, bucket):
                say(f"the bucket {bucket} would be made")
                continue
            await _rules(settings, objects, bucket, settings.notification_arns, say, dry_run=dry_run)
    finally:
        await objects.close()
        await metadata.close()
    if not dry_run:
        say("buckets " + ", ".join(buckets))


async def follow_bucket(settings: CommonSettings, bucket: str, say: Callable[[str], None]) -> None:
    """Have running bridges follow one more bucket, which is made if it is missing. Raises as `provision` does."""
    _check_name(bucket)
    objects, metadata = await object_store.connect(settings), await metadata_store.connect(settings)
    try:
        await metadata.check()
        await objects.ensure_bucket(bucket)
        # The rules first: what they announce before a bridge looks for it is found by the scan that it begins with.
        await _rules(settings, objects, bucket, settings.notification_arns, say)
        await metadata.add_bucket(bucket)
    finally:
        await objects.close()
        await metadata.close()


async def unfollow_bucket(settings: CommonSettings, bucket: str, say: Callable[[str], None]) -> None:
    """What is indexed of it stays. Raises ConfigurationError for a bucket that was not added by `follow_bucket`."""
    objects, metadata = await object_store.connect(settings), await metadata_store.connect(settings)
    try:
        if not await metadata.remove_bucket(bucket):
            named = " It is named in IMAGE_SEARCH_BUCKETS: take it out there." if bucket in settings.buckets else ""
            raise ConfigurationError(f"{bucket!r} is not among the added buckets.{named}")
        if bucket not in settings.buckets and not await _is_missing(objects, bucket):
            await _rules(settings, objects, bucket, (), say)
    finally:
        await objects.close()
        await metadata.close()


async def _rules(
    settings: CommonSettings,
    objects: ObjectStore,
    bucket: str,
    targets: Sequence[str],
    say: Callable[[str], None],
    *,
    dry_run: bool = False,
) -> None:
    """Of no concern for a store whose changes are heard of in another way."""
    if settings.follow == "notifications" and settings.notification_arns:
        await provision_rules(objects, bucket, targets, say=say, dry_run=dry_run)


def _check_name(bucket: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise ConfigurationError(
            f"{bucket!r} is no name of a bucket: it has 3 to 63 lower-case letters, digits, dots and hyphens, and begins and "
            "ends with a letter or digit"
        )


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
