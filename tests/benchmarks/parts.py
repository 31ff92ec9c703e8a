"""What the benchmarks are put together from: a part measures one thing with all of its arms in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tests.benchmarks.report import Result
from tests.stack import FullStack


@dataclass(slots=True)
class Run:
    """One call of the benchmarks. `quick`: fewer rounds and pictures, to see that a part works; no figures to publish.

    `rows`: of the index part; 0: as many as its goal is stated for, or few in a quick run.

    `cpu_seconds`: title of a table to the CPU-seconds of each process in it; parts add theirs.
    """

    console: Console
    quick: bool = False
    rows: int = 0
    cpu_seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.console.print(text)

    def of(self, full: int, quick: int) -> int:
        """How many: in a run whose figures count, and in a quick one."""
        return quick if self.quick else full

    @contextmanager
    def stack(self, profile: str = "embedded", **variables: str) -> Iterator[FullStack]:
        """A stack of its own, on the same cores as what is measured. `variables`: IMAGE_SEARCH_... of its services."""
        with (
            tempfile.TemporaryDirectory(prefix="image-search-bench-") as folder,
            FullStack.running(Path(folder), arguments=("--profile", profile), **variables) as stack,
        ):
            yield stack


@dataclass(frozen=True, slots=True)
class Part:
    """`name` is what --only takes."""

    name: str
    about: str
    measure: Callable[[Run], Sequence[Result]]
