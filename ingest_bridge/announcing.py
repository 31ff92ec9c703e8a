"""Object events on their way to the workers: their messages, the trace that each begins, and how many there were."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum

from infra.kafka.interface import Message
from infra.metrics import EVENTS_WRITTEN
from infra.tracing import Span, SpanKind, about, begin, carried_by, failed
from schemas.events import ObjectEvent


class Source(StrEnum):
    """Where the bridge heard of a change."""

    LOG = "log"
    TOPIC = "topic"
    WEBHOOK = "webhook"
    SCAN = "scan"


@contextmanager
def announced(events: Collection[ObjectEvent], source: Source) -> Iterator[list[Message]]:
    """The messages to send. The broker has them when the block ends well: then they are counted."""
    spans = [_span_of(event, source) for event in events]
    try:
        yield [
            Message(event.data.ref.topic_key, event.to_json(), carried_by(span))
            for event, span in zip(events, spans, strict=True)
        ]
    except BaseException as error:
        for span in spans:
            failed(span, type(error).__name__)
        raise
    finally:
        for span in spans:
            span.end()
    for event in events:
        change = event.data
        EVENTS_WRITTEN.labels(source, change.cause, "removal" if change.removed else "put").inc()


def _span_of(event: ObjectEvent, source: Source) -> Span:
    """It begins when the store says that the change happened: what passed until we heard of it is part of the way."""
    span = begin("object changed", SpanKind.PRODUCER, since=event.time)
    if span.is_recording():
        change = event.data
        span.set_attributes(
            {
                **about(change.ref),
                "image_search.cause": change.cause,
                "image_search.source": source,
                "image_search.removed": change.removed,
            }
        )
    return span
