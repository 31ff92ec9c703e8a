"""The real worker, of which one part stands still for a while, once, in the first batch.

Arguments: `model`, the thread that the model runs on, or `loop`, the event loop of the process; for how many seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from unittest.mock import patch

import structlog

from infra.settings import ProcessorSettings, load
from infra.telemetry import configure_logging
from processors.app import run
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.model_thread import ModelThread

BLOCKED, FREE = "it stands still", "it goes on"
STEP_BEFORE_THE_MODEL = 5


class Block:
    """Armed by a batch: the model already runs at the start of the process, for its check."""

    def __init__(self, part: str, seconds: float) -> None:
        self._part, self._seconds = part, seconds
        self._armed = self._over = False

    async def after_step(self, step: int) -> None:
        if step == STEP_BEFORE_THE_MODEL:
            self._armed = True
            if self._part == "loop":
                self.stand_still()

    def stand_still(self) -> None:
        if self._armed and not self._over:
            self._over = True
            structlog.get_logger().info(BLOCKED, part=self._part)
            time.sleep(self._seconds)
            structlog.get_logger().info(FREE, part=self._part)


if __name__ == "__main__":
    settings = load(ProcessorSettings, state_dir=Path("/nonexistent"))
    configure_logging(settings, "worker")
    part, seconds = sys.argv[1:]
    block = Block(part, float(seconds))
    embed = ModelThread._embed

    def late(self: ModelThread, pixels: Pixels) -> Vectors:
        if part == "model":
            block.stand_still()
        return embed(self, pixels)

    with patch.object(ModelThread, "_embed", late):
        sys.exit(asyncio.run(run(settings, after_step=block.after_step)))
