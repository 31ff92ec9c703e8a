"""What was traced while a block ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from infra.tracing import recorded_by


class Spans:
    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def below(self, parent: ReadableSpan) -> list[str]:
        """Names of its children, in the order in which they ended."""
        return [span.name for span in self.all() if span.parent is not None and span.parent.span_id == span_id(parent)]


@contextmanager
def recorded_spans(*, sample_share: float = 1.0) -> Iterator[Spans]:
    exporter = InMemorySpanExporter()
    with recorded_by(SimpleSpanProcessor(exporter), "test", sample_ratio=sample_share):
        yield Spans(exporter)


def trace_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    identity: int = span.context.span_id
    return identity


def header_of(span: ReadableSpan) -> str:
    """The `traceparent` by which this span's trace goes on."""
    assert span.context is not None
    return f"00-{trace_id(span)}-{format_span_id(span_id(span))}-{span.context.trace_flags:02x}"


def linked_ids(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}
