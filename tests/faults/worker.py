"""The real worker with one addition: it kills itself by SIGKILL after a given step, once work has come through it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from infra.settings import ProcessorSettings, load
from infra.telemetry import configure_logging
from processors.app import run
from processors.pipeline import AfterStep


def killer(after: int) -> AfterStep:
    async def kill(step: int) -> None:
        if step == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


if __name__ == "__main__":
    settings = load(ProcessorSettings, state_dir=Path("/nonexistent"))
    configure_logging(settings, "worker")
    kill_after = int(sys.argv[1])
    sys.exit(asyncio.run(run(settings, after_step=killer(kill_after) if kill_after else None)))
