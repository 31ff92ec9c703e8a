"""Topics, buckets and their notification rules, made ahead of the services, so that none makes them in passing."""

from __future__ import annotations

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
    if settings.follow == "notifications" and not settings.notification_arns:
        say(f"no notification rules are set: have the store announce the changes of {bucket} as it does those of the others")


async def unfollow_bucket(settings: CommonSettings, bucket: str, say: Callable[[str], None]) -> None:
    """No row and no vector goes (invariant 11). Raises ConfigurationError for a bucket that `follow_bucket` did not add."""
    objects, metadata = await object_store.connect(settings), await metadata_store.connect(settings)
    try:
        if bucket in settings.buckets:
            await metadata.remove_bucket(bucket)
            raise ConfigurationError(f"{bucket!r} is named in IMAGE_SEARCH_BUCKETS, and followed until it is taken out there")
        if bucket not in await metadata.added_buckets():
            raise ConfigurationError(f"{bucket!r} is not among the added buckets")
        await _take_rules_away(settings, objects, bucket, say)
        await metadata.remove_bucket(bucket)
    finally:
        await objects.close()
        await metadata.close()


async def _take_rules_away(settings: CommonSettings, objects: ObjectStore, bucket: str, say: Callable[[str], None]) -> None:
    try:
        await _rules(settings, objects, bucket, (), say)
    except StoreRefused as refused:
        # It is gone, or not ours any more: a reason to take it away, none to keep it.
        say(f"notification rules of {bucket} stay as they are: {refused}")


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
