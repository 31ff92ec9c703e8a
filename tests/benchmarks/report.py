"""What a run of the benchmarks measured: tables for people, build/bench.json for machines, a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from rich.console import Console
from rich.table import Table

RESULTS: Final = Path("build/bench.json")
TABLES: Final = RESULTS.with_suffix(".md")
CHART: Final = RESULTS.with_suffix(".png")
BUSY: Final = 0.5
COLUMNS: Final = ("measure", "value", "goal", "met", "rounds", "spread", "arms (median)")


@dataclass(frozen=True, slots=True)
class Result:
    """`goal` is an upper bound unless `at_least`. `rounds` holds the raw values behind `value`.

    `arms`: what was compared, by name, each with its raw rounds. Arms of one result take turns in one run.
    """

    id: str
    value: float
    goal: float
    unit: str
    at_least: bool = False
    rounds: Sequence[float] = field(default_factory=tuple)
    arms: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def bound(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.goal:g}"


def ratio(name: str, goal: float, arms: Mapping[str, Sequence[float]], *, at_least: bool = True) -> Result:
    """The first arm over the second, round by round; the median of the rounds counts."""
    ours, theirs = list(arms.values())[:2]
    rounds = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Result(name, median(rounds), goal, "×", at_least=at_least, rounds=rounds, arms=arms)


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
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "vector_units": wide,
        "python": platform.python_version(),
    }


def busy_with(load: float) -> str:
    """For the title. `load`: of the minute before the run. Beside other work arms are hit unequally, torch the hardest."""
    return f"; the machine was busy (load {load:.1f} before the run): no figures to publish" if load > BUSY else ""


def publish(
    results: Sequence[Result],
    cpu_seconds: Mapping[str, Mapping[str, float]],
    console: Console,
    *,
    failed: Sequence[str] = (),
    quick: bool = False,
    load: float = 0.0,
) -> None:
    """`cpu_seconds`: title to the CPU-seconds of each process.

    `failed`: parts whose results are missing. `load`: of the machine, before the run."""
    # Imported here, because it draws with what is reported here.
    from tests.benchmarks.chart import ratio_chart

    about = machine()
    hurried = "; a quick run: no figures to publish" if quick else ""
    title = f"{about['processor']}, {about['cores']} cores{hurried}{busy_with(load)}"
    table = Table(*COLUMNS, title=title)
    for one in results:
        table.add_row(*cells(one), style=None if one.met else "red")
    console.print(table)
    for name, by_process in cpu_seconds.items():
        rows = Table("process", "CPU-seconds", "share", title=name)
        for row in shares(by_process):
            rows.add_row(*row)
        console.print(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    document = {
        "machine": about,
        "quick": quick,
        "load_before": load,
        "failed": list(failed),
        "results": [{**asdict(one), "met": one.met} for one in results],
        "cpu_seconds": cpu_seconds,
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    TABLES.write_text(markdown(results, cpu_seconds, title))
    ratio_chart(results, title, CHART)
    console.print(f"written: {RESULTS}, {TABLES}, {CHART}")


def cells(one: Result) -> tuple[str, ...]:
    """A row of the table, in the order of COLUMNS."""
    spread = f"{min(one.rounds):.3g} to {max(one.rounds):.3g}" if one.rounds else ""
    arms = ", ".join(f"{name} {median(values):.4g}" for name, values in one.arms.items())
    rounds = len(one.rounds) or max((len(values) for values in one.arms.values()), default=0)
    value = f"{one.value:.3g} {one.unit}".strip()
    return one.id, value, one.bound, "yes" if one.met else "no", str(rounds or ""), spread, arms


def shares(by_process: Mapping[str, float]) -> list[tuple[str, str, str]]:
    total = sum(by_process.values()) or 1.0
    ordered = sorted(by_process.items(), key=lambda item: -item[1])
    return [(name, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %") for name, seconds in ordered]


def markdown(results: Sequence[Result], cpu_seconds: Mapping[str, Mapping[str, float]], title: str) -> str:
    """The tables as docs/performance.md has them."""
    parts = [f"{title}\n\n" + _rows(COLUMNS, map(cells, results))]
    parts += [f"{name}:\n\n" + _rows(("process", "CPU-seconds", "share"), shares(each)) for name, each in cpu_seconds.items()]
    return "\n".join(parts)


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: no value that was not measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]
