"""The real worker with one addition, after a given step of a batch: it kills itself by SIGKILL, or holds the batch there until
a file appears.

Arguments: step to be killed after (0: never), step to hold after (0: never), that file.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import structlog

from infra.settings import ProcessorSettings, load
from infra.telemetry import configure_logging
from infra.tracing import traces
from processors.app import run
from processors.pipeline import AfterStep

HELD = "a batch is held"


def killer(after: int) -> AfterStep:
    async def kill(step: int) -> None:
        if step == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def holder(after: int, release: Path) -> AfterStep:
    async def hold(step: int) -> None:
        if step == after and not await asyncio.to_thread(release.exists):
            structlog.get_logger().info(HELD, step=step)
            while not await asyncio.to_thread(release.exists):
                await asyncio.sleep(0.05)

    return hold


def after_step(kill_after: int, hold_after: int, release: Path) -> AfterStep | None:
    if kill_after:
        return killer(kill_after)
    return holder(hold_after, release) if hold_after else None


if __name__ == "__main__":
    settings = load(ProcessorSettings, state_dir=Path("/nonexistent"))
    configure_logging(settings, "worker")
    failpoint = after_step(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    with traces(settings, "worker"):
        status = asyncio.run(run(settings, after_step=failpoint))
    sys.exit(status)
