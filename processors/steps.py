"""How long each step of a batch takes: in the metrics, and in the batch's trace if there is one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from infra.metrics import STEP_SECONDS
from infra.tracing import note_step


@dataclass(slots=True)
class Took:
    """Known when the step has ended."""

    seconds: float = 0.0


@contextmanager
def timed(step: int, name: str) -> Iterator[Took]:
    """A numbered step of ARCHITECTURE.md. One that fails is not counted: it has not been done."""
    took = Took()
    started = time.perf_counter()
    yield took
    took.seconds = time.perf_counter() - started
    STEP_SECONDS.labels(f"{step} {name}").observe(took.seconds)
    note_step(f"{step} {name}", took.seconds)
