"""Traces: the one home of OpenTelemetry. Nothing is recorded or sent unless an address to send to is set.

A trace begins where a change is heard of, goes on in the headers of messages (W3C trace context), and ends with the outcome.
Whoever does not record hands on what came: the header of a request or message reaches the outcome in any case.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from time import time_ns
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from infra.settings import CommonSettings
from schemas.identity import ObjectRef
from schemas.topics import HEADER_TRACE_PARENT

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

__all__ = [
    "NO_SPAN", "Span", "SpanKind", "about", "begin", "carried_by", "current_trace_id", "failed", "linked", "note_step",
    "recorded_by", "trace_id_of", "traces", "within",
]  # fmt: skip

NO_SPAN = INVALID_SPAN
SEND_SECONDS = 5.0
"""Longest wait for the receiver of traces to take some."""
LAST_SEND_SECONDS = 2.0
"""How long the end of a process waits for the last spans to be taken."""
NANOSECONDS = 1_000_000_000

_HEADERS = TraceContextTextMapPropagator()
_tracer: trace.Tracer = trace.NoOpTracer()


# -- switching it on -----------------------------------------------------------------------------------------------------
@contextmanager
def traces(settings: CommonSettings, service: str) -> Iterator[None]:
    """While this lasts, what is traced in this process is sent, by a thread of its own that nothing waits for.

    What a receiver that is away does not take is dropped. The libraries are imported only here: who sends nothing pays nothing.
    """
    if not settings.traces_endpoint:
        yield
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    exporter = OTLPSpanExporter(settings.traces_endpoint, timeout=SEND_SECONDS)
    processor = BatchSpanProcessor(exporter)
    # Closing the exporter is what ends a last attempt that takes too long.
    cut = threading.Timer(LAST_SEND_SECONDS, exporter.shutdown)
    try:
        with recorded_by(processor, service, deployment=settings.deployment, sample_ratio=settings.traces_sample_share):
            try:
                yield
            finally:
                cut.start()
    finally:
        cut.cancel()


@contextmanager
def recorded_by(
    processor: SpanProcessor, service: str, *, deployment: str = "local", sample_ratio: float = 1.0
) -> Iterator[None]:
    """Hand every span that ends to this processor, and end it with the block."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415

    global _tracer  # noqa: PLW0603 - one for the process, as the library's own, which could be set only once
    resource = Resource.create(
        {
            "service.namespace": "image-search",
            "service.name": service,
            "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
            "deployment.environment.name": deployment,
        }
    )
    # Who begins a trace decides whether it is recorded, and all that take part keep to that.
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(sample_ratio), resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    before, _tracer = _tracer, provider.get_tracer("image-search")
    try:
        yield
    finally:
        _tracer = before
        provider.shutdown()


# -- spans -----------------------------------------------------------------------------------------------------------------
def begin(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    headers: Mapping[str, str] | None = None,
    parent: Span = NO_SPAN,
    since: datetime | None = None,
) -> Span:
    """A span below the one that `headers` name or below `parent`, else the first of a trace. Whoever begins it ends it.

    `since`: it began before anybody here knew. A clock that is ahead of ours makes it begin now.
    """
    context = Context()
    if headers and HEADER_TRACE_PARENT in headers:
        context = _HEADERS.extract(headers, context)
    elif parent is not NO_SPAN:
        context = trace.set_span_in_context(parent, context)
    start = None if since is None else min(time_ns(), round(since.timestamp() * NANOSECONDS))
    return _tracer.start_span(name, context, kind, start_time=start)


def carried_by(span: Span) -> dict[str, str]:
    """The headers by which this span's trace goes on elsewhere; none if there is no trace."""
    headers: dict[str, str] = {}
    if span is not NO_SPAN:
        _HEADERS.inject(headers, trace.set_span_in_context(span, Context()))
    return headers


@contextmanager
def within(span: Span) -> Iterator[None]:
    """The block is what the span is about: lines logged in it name its trace, and it ends with the block."""
    if span is NO_SPAN:
        yield
        return
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except Exception as error:
            failed(span, type(error).__name__)
            raise


def note_step(name: str, seconds: float) -> None:
    """A step that has just ended, below the span that we are within. Nothing where nothing is recorded."""
    span = trace.get_current_span()
    if span.is_recording():
        now = time_ns()
        _tracer.start_span(name, start_time=now - round(seconds * NANOSECONDS)).end(now)


def failed(span: Span, why: str) -> None:
    span.set_status(StatusCode.ERROR, why)


def linked(span: Span, other: Span) -> None:
    """Show the way from one to the other, which may be of another trace."""
    if span.is_recording():
        span.add_link(other.get_span_context())


def about(ref: ObjectRef) -> dict[str, str]:
    """What a span says of its object. A key may hold halves of characters, which no message to a receiver can."""
    return {
        "image_search.object_id": ref.object_id.hex(),
        "image_search.bucket": ref.bucket,
        "image_search.key": ref.key.encode("utf-8", "replace").decode(),
    }


def current_trace_id() -> str | None:
    return trace_id_of(trace.get_current_span())


def trace_id_of(span: Span) -> str | None:
    """As log lines and trace viewers write it; None without a trace."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None
