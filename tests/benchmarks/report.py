"""What a run of the benchmarks measured: a table for people, build/bench.json for machines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path("build/bench.json")


@dataclass(frozen=True, slots=True)
class Result:
    """`goal` is an upper bound unless `at_least`. `rounds` holds the raw values behind `value`."""

    id: str
    value: float
    goal: float
    unit: str
    at_least: bool = False
    rounds: Sequence[float] = field(default_factory=tuple)

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def machine() -> dict[str, object]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags]
    return {"processor": model, "cores": os.cpu_count(), "vector_units": wide, "python": platform.python_version()}


def publish(results: Sequence[Result], cpu_seconds: dict[str, float], console: Console) -> None:
    about = machine()
    table = Table("measure", "value", "goal", "unit", "met", title=f"{about['processor']}, {about['cores']} cores")
    for one in results:
        goal = f"{'≥' if one.at_least else '≤'} {one.goal:g}"
        table.add_row(one.id, f"{one.value:.3g}", goal, one.unit, "yes" if one.met else "[red]no[/red]")
    console.print(table)
    rows = Table("process", "CPU-seconds", "share", title="CPU-seconds of the backlog, by process")
    total = sum(cpu_seconds.values()) or 1.0
    for name, seconds in sorted(cpu_seconds.items(), key=lambda item: -item[1]):
        rows.add_row(name, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %")
    console.print(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    document = {
        "machine": about,
        "results": [{**asdict(one), "rounds": list(one.rounds), "met": one.met} for one in results],
        "cpu_seconds": cpu_seconds,
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"written: {RESULTS}")


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: no value that was not measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]
