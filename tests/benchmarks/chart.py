"""The ratios of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.benchmarks.report import Result


def ratio_chart(results: Sequence[Result], title: str, file: Path) -> None:
    """A bar for each ratio, as a share of its goal, so that 1 is the goal for all; longer is better for all."""
    shown = [one for one in results if one.unit == "×" and one.value > 0][::-1]
    figure = Figure(figsize=(11, 1.5 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    shares = [of_goal(one) for one in shown]
    bars = axes.barh([one.id for one in shown], shares, color=["tab:green" if one.met else "tab:red" for one in shown])
    axes.bar_label(bars, [f"{one.value:.3g}  ({one.bound})" for one in shown], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="share of the goal", title=title, xlim=(0, 1.3 * max([1.0, *shares])))
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(file, dpi=110)


def of_goal(one: Result) -> float:
    return one.value / one.goal if one.at_least else one.goal / one.value
