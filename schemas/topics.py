"""Every topic and its settings. All of one object's events lie in one partition of a topic."""

from __future__ import annotations

from dataclasses import dataclass

_DAY_MS = 24 * 3600 * 1000
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic of ours. `name` is without the deployment's prefix. `max_message_bytes` counts key, value and headers."""

    name: str
    retention_ms: int
    max_message_bytes: int = _MIB

    def full_name(self, prefix: str) -> str:
        return f"{prefix}{self.name}"

    @property
    def settings(self) -> dict[str, str]:
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(self.max_message_bytes),
            # A record's time is when we wrote it: `indexed_through` reads it back.
            "message.timestamp.type": "CreateTime",
        }


OBJECT_NOTIFICATIONS = Topic("object-notifications", 7 * _DAY_MS)
OBJECTS = Topic("objects", 7 * _DAY_MS)
OUTCOMES = Topic("outcomes", 30 * _DAY_MS)
# A dead letter is a message as it came, whatever its size, and headers beside it.
DEAD_LETTERS = Topic("dead-letters", 30 * _DAY_MS, max_message_bytes=2 * _MIB)

ALL_TOPICS = (OBJECT_NOTIFICATIONS, OBJECTS, OUTCOMES, DEAD_LETTERS)

PROCESSOR_GROUP = "processors"
"""The consumer group of the workers, without the deployment's prefix. Faust uses its app id as the group."""
RELAY_GROUP = "relay"
"""The consumer group of the bridges that turn notifications into object events, without the deployment's prefix."""

HEADER_TRACE_PARENT = "traceparent"
"""Of object events, outcomes and dead letters that are traced: the trace they belong to (W3C trace context)."""

# Headers of a dead letter, beside the message as it came. Topic, partition and offset together are its identity.
HEADER_TOPIC = "image-search-topic"
HEADER_PARTITION = "image-search-partition"
HEADER_OFFSET = "image-search-offset"
HEADER_REASON = "image-search-reason"
HEADER_ERROR = "image-search-error"
HEADER_ATTEMPT = "image-search-attempt"
