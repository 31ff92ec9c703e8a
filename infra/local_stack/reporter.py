"""What a person sees while a stack starts, runs and stops."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

from infra.local_stack.supervisor import Running

PLAIN_PAUSE_SECONDS = 2.0
"""Without a terminal, a step that goes on tells about itself this often."""


class Reporter:
    """A line for each thing done; on a terminal also a spinner with what is being done now. May be called from threads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._status: Status | None = console.status("") if console.is_terminal else None
        self._said = 0.0
        self._seen: dict[str, str] = {}

    def __enter__(self) -> Reporter:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.quiet()

    def quiet(self) -> None:
        """Nothing is being done now."""
        if self._status is not None:
            self._status.stop()

    def doing(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._said >= PLAIN_PAUSE_SECONDS:
            self._said = time.monotonic()
            self.console.print(f"  {text}", highlight=False, markup=False)

    def done(self, text: str) -> None:
        self.console.print(f"[green]✓[/] {text}", highlight=False)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]![/] {text}", highlight=False)

    def program_changed(self, running: Running) -> None:
        """Heard by the supervisor: a line for each program that became ready or ended on its own."""
        name, state = running.program.name, running.state
        if self._seen.get(name) == state:
            return
        self._seen[name] = state
        if state == "ready":
            again = " again" if running.restarts else ""
            self.done(f"{name} is ready{again} ({time.monotonic() - running.started:.1f} s, pid {running.pid})")
        elif state == "restarting":
            self.warn(f"{name} {running.trouble} and is started again; its log: {running.log_path}")
        elif state == "stopped":
            self.done(f"{name} has stopped")
