"""What a person sees of a scan: a bar with an estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from infra.metadata_store.interface import Job
from ingest_bridge.scan_state import ScanPhase, ScanProgress
from schemas.tables import JobState

PLAIN_PAUSE_SECONDS = 2.0

_DOING = {
    ScanPhase.QUEUED: "waiting for the bridge",
    ScanPhase.LISTING: "listing the bucket",
    ScanPhase.COMPARING: "comparing",
    ScanPhase.REMOVING: "looking for removed objects",
    ScanPhase.PUBLISHING: "looking for outcomes still owed",
    ScanPhase.VECTORS: "comparing vectors and rows",
    ScanPhase.DONE: "done",
}


class ScanDisplay:
    """A context manager; `show` takes the job as it stands."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said_at = 0.0
        self._said = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[written]} events"),
            TextColumn("{task.fields[remaining]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, written=0, remaining="")

    def __enter__(self) -> ScanDisplay:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, job: Job) -> None:
        progress = ScanProgress.model_validate(job.progress)
        doing = "waiting for the workers" if progress.waiting_for_workers else _DOING[progress.phase]
        done, total = _how_far(progress)
        remaining = _remaining(progress, job.state)
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                description=doing,
                total=total,
                completed=done,
                written=progress.written,
                remaining=remaining,
            )
            return
        line = f"{doing}: {done} of {total or '?'} compared, {progress.written} events written {remaining}".rstrip()
        if line != self._said and time.monotonic() - self._said_at >= PLAIN_PAUSE_SECONDS:
            self._said, self._said_at = line, time.monotonic()
            self._console.print(line, highlight=False, markup=False)


def _how_far(progress: ScanProgress) -> tuple[int, int | None]:
    """How many are compared, and of how many; None while nobody knows."""
    if progress.phase is ScanPhase.VECTORS:
        return progress.checked, progress.to_check or None
    if progress.phase is ScanPhase.LISTING:
        return progress.compared, None
    return progress.compared, progress.listed or None


def _remaining(progress: ScanProgress, state: JobState) -> str:
    if state is not JobState.RUNNING or progress.eta_seconds is None:
        return ""
    minutes, seconds = divmod(round(progress.eta_seconds), 60)
    return f"about {minutes} min {seconds} s left" if minutes else f"about {seconds} s left"


def result_lines(job: Job) -> str:
    """How it ended, in words."""
    progress = ScanProgress.model_validate(job.progress)
    if job.state is JobState.DONE:
        text = (
            f"Scan done: {progress.compared} objects compared, {progress.written} events written, "
            f"{progress.removed} of them for removed objects and {progress.repairs} for vectors."
        )
        if progress.unnameable:
            text += f" {progress.unnameable} objects were left out, their keys are too long: the bridge's log names them."
        return text
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        return "No bridge is working on the scan. It stays queued until one runs. See: image-search status"
    return f"Scan {job.state}: {job.message}"
