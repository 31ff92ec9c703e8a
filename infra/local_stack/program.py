"""What the supervisor runs: one process, how to tell that it is ready, and how long it may take to stop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import TransientError


class NotReady(TransientError):
    """The program does not answer yet. The message says what was tried."""


@dataclass(frozen=True, slots=True)
class Program:
    """`ready` returns when the program answers a real request and raises NotReady until then.

    `library_path` is searched for shared libraries by this program alone. It is no part of `environment`, because the
    launcher that comes before the program must not load Milvus's old copies of system libraries.
    """

    name: str
    command: tuple[str, ...]
    working_dir: Path
    ready: Callable[[], Awaitable[None]]
    environment: Mapping[str, str] = field(default_factory=dict)
    library_path: Path | None = None
    start_seconds: float = 180.0
    stop_seconds: float = 15.0
