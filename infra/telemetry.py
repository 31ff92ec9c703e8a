"""Logs of every process: structlog, one JSON object a line (or for people on a console), libraries' own lines included."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from infra.settings import CommonSettings
from infra.tracing import current_trace_id

_NOISY = {
    # pymilvus writes a whole traceback for each call that fails, although the error is raised to us as well.
    "pymilvus": logging.CRITICAL,
    # Its client says once a second that a broker is away; who needs the broker says so too, and less often.
    "aiokafka": logging.CRITICAL,
    "aiokafka.consumer": logging.WARNING,
    "aiokafka.producer": logging.WARNING,
    "faust": logging.WARNING,
    "mode": logging.WARNING,
    "alembic": logging.WARNING,
    "aiosqlite": logging.WARNING,
    # Says each attempt to reach a receiver that is away; that spans were dropped is an error, and stays.
    "opentelemetry": logging.ERROR,
}


def configure_logging(settings: CommonSettings, service: str) -> None:
    """Set up logging for this process. Call once, first thing in a command."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        add_trace_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: Any
    if settings.log_format == "json":
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name, level in _NOISY.items():
        logging.getLogger(name).setLevel(max(level, root.level))
    structlog.contextvars.bind_contextvars(service=service, deployment=settings.deployment)


def add_trace_id(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ANN401
    """A line that names its trace keeps that: in a batch each object has one of its own."""
    if "trace_id" not in event and (trace_id := current_trace_id()) is not None:
        event["trace_id"] = trace_id
    return event
