"""How large a message may be, the same for the real broker and its twin."""

from __future__ import annotations

from infra.errors import InvalidEvent
from infra.kafka.interface import Message
from schemas.events import ReasonCode
from schemas.topics import Topic

# The broker counts a message with its batch around it; these are above what Kafka's record format adds.
BATCH_OVERHEAD_BYTES = 128
HEADER_OVERHEAD_BYTES = 10


def check_size(topic: Topic, message: Message) -> None:
    """Raises InvalidEvent for a message that the topic does not take: sent again, it would be refused for ever."""
    headers = sum(len(name.encode()) + len(value.encode()) + HEADER_OVERHEAD_BYTES for name, value in message.headers.items())
    size = len(message.key) + len(message.value) + headers + BATCH_OVERHEAD_BYTES
    if size > topic.max_message_bytes:
        raise InvalidEvent(
            ReasonCode.EVENT_INVALID,
            f"a message of {size} bytes; the topic {topic.name} takes {topic.max_message_bytes}",
        )
