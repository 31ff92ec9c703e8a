"""The real worker with one addition: what its arguments say it shall do wrong (tests/failpoints.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from infra.settings import ProcessorSettings, load
from infra.telemetry import configure_logging
from infra.tracing import traces
from processors.app import run
from processors.pipeline import AfterStep
from processors.reading import Read, Reader
from processors.work import Work
from tests.failpoints import Gate


def killer(after: int) -> AfterStep:
    async def kill(step: int) -> None:
        if step == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def holder(after: int, gate: Gate) -> AfterStep:
    async def hold(step: int) -> None:
        if step == after:
            await gate.pass_through()

    return hold


def reader_stopped_at(key: str, gate: Gate, *, fails: bool) -> type[Reader]:
    class StoppedReader(Reader):
        async def read_all(self, works: Sequence[Work]) -> list[Read]:
            if any(work.ref.key == key for work in works) and await gate.pass_through() and fails:
                raise RuntimeError("a failpoint")
            return await super().read_all(works)

    return StoppedReader


async def work(settings: ProcessorSettings, failpoint: Sequence[str]) -> int:
    match failpoint:
        case ["kill after", step]:
            return await run(settings, after_step=killer(int(step)))
        case ["hold after", step, folder]:
            return await run(settings, after_step=holder(int(step), Gate(Path(folder))))
        case ["hold at" | "fail at" as kind, key, folder]:
            with patch("processors.app.Reader", reader_stopped_at(key, Gate(Path(folder)), fails=kind == "fail at")):
                return await run(settings)
    return await run(settings)


if __name__ == "__main__":
    settings = load(ProcessorSettings, state_dir=Path("/nonexistent"))
    configure_logging(settings, "worker")
    with traces(settings, "worker"):
        status = asyncio.run(work(settings, sys.argv[1:]))
    sys.exit(status)
