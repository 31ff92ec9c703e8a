"""What a person sees of a scan: how far each phase is, and how it ended."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from infra.metadata_store.interface import Job
from ingest_bridge.scan_display import ScanDisplay, result_lines
from ingest_bridge.scan_state import ScanPhase, ScanProgress
from schemas.tables import JobState


def job(progress: Mapping[str, object], state: JobState = JobState.RUNNING, message: str | None = None) -> Job:
    return Job("1", "scan", {"bucket": "images"}, state, ScanProgress.model_validate(progress).model_dump(mode="json"), message)


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        ({"phase": ScanPhase.LISTING, "listed": 5}, "listing the bucket: 0 of ? compared, 0 events written"),
        (
            {"phase": ScanPhase.COMPARING, "listed": 9, "compared": 4, "written": 2, "eta_seconds": 61},
            "comparing: 4 of 9 compared, 2 events written about 1 min 1 s left",
        ),
        (
            {"phase": ScanPhase.VECTORS, "listed": 9, "compared": 9, "checked": 7, "to_check": 18, "written": 2},
            "comparing vectors and rows: 7 of 18 compared, 2 events written",
        ),
        (
            {"phase": ScanPhase.VECTORS, "listed": 9, "compared": 9, "waiting_for_workers": True},
            "waiting for the workers: 0 of ? compared, 0 events written",
        ),
    ],
    ids=["listing", "comparing", "vectors", "waiting"],
)
def test_each_phase_counts_what_it_is_about(progress: dict[str, object], line: str) -> None:
    shown = io.StringIO()
    with ScanDisplay(Console(file=shown, width=200)) as display:
        display.show(job(progress))
    assert shown.getvalue().strip() == line


def test_the_end_tells_what_was_written_for_what() -> None:
    done = result_lines(job({"compared": 10, "written": 6, "removed": 2, "repairs": 3, "unnameable": 1}, JobState.DONE))
    assert done.startswith("Scan done: 10 objects compared, 6 events written, 2 of them for removed objects and 3 for vectors.")
    assert "1 objects were left out" in done
    assert result_lines(job({}, JobState.STOPPED, "too many")) == "Scan stopped: too many"
    assert "No bridge" in result_lines(job({}, JobState.QUEUED))
