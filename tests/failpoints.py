"""What a worker of the fault tests shall do wrong: said here, done by tests/faults/worker.py."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

PATIENCE_SECONDS = 120.0
LOOK_SECONDS = 0.02

Failpoint = tuple[str, ...]
"""Arguments of tests/faults/worker.py. None: the worker does nothing wrong."""


def kill_after(step: int) -> Failpoint:
    """The worker ends itself by SIGKILL the first time that it has done this step of a batch."""
    return ("kill after", str(step))


def hold_after(step: int, gate: Gate) -> Failpoint:
    """A batch that has done this step waits at the gate, if it is closed."""
    return ("hold after", str(step), str(gate.folder))


def hold_at(key: str, gate: Gate) -> Failpoint:
    """Before it reads its objects, a batch that holds this one waits at the gate, if it is closed."""
    return ("hold at", key, str(gate.folder))


def fail_at(key: str, gate: Gate) -> Failpoint:
    """As `hold_at`, and after the wait the reading raises what no code foresees."""
    return ("fail at", key, str(gate.folder))


class Gate:
    """Where batches of a worker wait until the test lets them go on. Test and worker see it as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    # -- the test's side ---------------------------------------------------------------------------------------------
    def close(self, places: int = 1) -> None:
        """The next that come wait, as many as there are places; those behind them pass."""
        for place in range(places):
            (self.folder / f"free-{place}").touch()

    def open(self) -> None:
        """All who wait go on. Places that nobody took stay."""
        for waiting in self.folder.glob("taken-*"):
            waiting.unlink()

    async def reached(self) -> None:
        """Returns when every place is taken."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while any(self.folder.glob("free-*")):
                await asyncio.sleep(LOOK_SECONDS)

    # -- the worker's side -------------------------------------------------------------------------------------------
    async def pass_through(self) -> bool:
        """Whether the gate was closed: returns then when it was opened."""
        mine = self.folder / f"taken-{uuid.uuid4().hex}"
        if not any(self._took(free, mine) for free in self.folder.glob("free-*")):
            return False
        while mine.exists():
            await asyncio.sleep(LOOK_SECONDS)
        return True

    @staticmethod
    def _took(free: Path, mine: Path) -> bool:
        try:
            free.rename(mine)
        except FileNotFoundError:
            return False
        return True
