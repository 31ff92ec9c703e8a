"""How far a command is: a bar with an estimate for each part of its work; without a terminal a line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Progress: TypeAlias = Callable[[str, int], Callable[[int], None]]
"""Begins a part of the work, so long; what it returns is told of each step."""


@contextmanager
def shown_on(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:

        def begin(description: str, total: int) -> Callable[[int], None]:
            if not console.is_terminal:
                console.print(f"{description}: {total}")
            task = bars.add_task(description, total=total)
            return lambda steps: bars.advance(task, steps)

        yield begin
