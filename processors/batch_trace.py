"""The traces of a batch: each event goes on in the trace that it came with, and its span shows the way to the batch's.

The batch's own span, with its steps, lies in the trace of the first of its events that is recorded: alone in a batch, an event
has all of its way in one trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import structlog

from infra.tracing import NO_SPAN, SpanKind, about, begin, failed, linked, within
from processors.work import Delivery, PartitionsRevoked, Work, names_of
from schemas.events import OutcomeEvent

log = structlog.get_logger(__name__)


@contextmanager
def traced(deliveries: Sequence[Delivery]) -> Iterator[list[Delivery]]:
    """The same deliveries, each with its span, which ends with the block."""
    spans = [begin("work on object", SpanKind.CONSUMER, headers=delivery.headers) for delivery in deliveries]
    recorded = [span for span in spans if span.is_recording()]
    batch = begin("batch", parent=recorded[0]) if recorded else NO_SPAN
    batch.set_attribute("image_search.events", len(deliveries))
    for span in recorded:
        linked(span, batch)
        linked(batch, span)
    try:
        with within(batch):
            yield [
                delivery if span is NO_SPAN else replace(delivery, span=span)
                for delivery, span in zip(deliveries, spans, strict=True)
            ]
    except PartitionsRevoked:
        for span in recorded:
            span.set_attribute("image_search.dropped", True)
        raise
    except BaseException as error:
        for span in recorded:
            failed(span, type(error).__name__)
        raise
    finally:
        for span in recorded:
            span.end()


def note_works(works: Sequence[Work], kept: Collection[Work]) -> None:
    """What each event is about, and which of them another one of the batch speaks for."""
    speaks_for = {work.object_id: work.delivery for work in kept}
    for work in works:
        span = work.delivery.span
        if not span.is_recording():
            continue
        span.set_attributes({**about(work.ref), "image_search.cause": work.change.cause})
        if (other := speaks_for[work.object_id]) is not work.delivery:
            span.set_attribute("image_search.collapsed", True)
            linked(span, other.span)


def note_known(work: Work) -> None:
    work.delivery.span.set_attribute("image_search.known", True)


def note_outcome(delivery: Delivery, outcome: OutcomeEvent) -> None:
    """In the span, and for those who have no traces, in the log: which object ended how."""
    data = outcome.data
    log.debug("outcome", type=outcome.type, generation=data.generation, **names_of(delivery, data.ref.object_id))
    span = delivery.span
    if span.is_recording():
        span.add_event(outcome.type, {"image_search.generation": data.generation})
        if data.reason is not None:
            span.set_attribute("image_search.reason", data.reason)
