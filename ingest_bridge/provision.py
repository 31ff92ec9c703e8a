"""The bridge's part of `image-search upgrade`: topics and buckets, so that no service makes them in passing."""

from __future__ import annotations

from collections.abc import Callable

from infra import kafka, object_store
from infra.settings import ProcessorSettings
from schemas.topics import ALL_TOPICS


async def upgrade_step(settings: ProcessorSettings, say: Callable[[str], None]) -> None:
    """Make what is missing and leave what is there. Raises StoreUnavailable, StoreRefused."""
    broker = await kafka.connect(settings)
    try:
        await broker.ensure_topics(ALL_TOPICS, partitions=settings.kafka_partitions, replication=settings.kafka_replication)
    finally:
        await broker.close()
    say("topics " + ", ".join(topic.full_name(settings.kafka_topic_prefix) for topic in ALL_TOPICS))
    objects = await object_store.connect(settings)
    try:
        for bucket in settings.buckets:
            await objects.ensure_bucket(bucket)
    finally:
        await objects.close()
    say("buckets " + ", ".join(settings.buckets))
