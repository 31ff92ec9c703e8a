"""Pictures of an evaluation: precision and recall, scores, and the worst misses. The only place that imports matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from processors.training.edits import Edit
from processors.training.ranking import SCORE_BIN_EDGES, PairRanking, Ranking
from processors.training.report import Miss, ModelReport

DOTS_PER_INCH: Final = 110
MOST_POINTS: Final = 2000
"""Of a curve: more cannot be told apart."""

Thumbnail: TypeAlias = Callable[[Path, Edit | None], Image.Image | None]
"""A picture by its file and the edit that was made of it; None when it cannot be read any more."""


def precision_recall(rankings: Mapping[str, Ranking], file: Path) -> None:
    """A curve for each model."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for label, ranking in rankings.items():
        recall, precision = _curve(ranking.pairs)
        axes.plot(recall, precision, label=label)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01), title="All pairs by falling score")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    _save(figure, file)


def score_histograms(reports: Sequence[ModelReport], rankings: Mapping[str, Ranking], file: Path) -> None:
    """Right and wrong pairs by score, a panel for each model, and where its bands begin."""
    figure = Figure(figsize=(7, 3 * len(reports)), layout="constrained")
    for axes, report in zip(figure.subplots(len(reports), squeeze=False)[:, 0], reports, strict=True):
        ranking = rankings[report.label]
        for name, counts in (("wrong pairs", ranking.wrong_histogram), ("right pairs", ranking.right_histogram)):
            shares = counts / max(1, counts.sum())
            axes.stairs(shares, SCORE_BIN_EDGES, fill=True, alpha=0.6, label=name)
        for name, band, style in (("likely", report.measures.likely, ":"), ("surely the same", report.measures.surely, "--")):
            if band is not None:
                axes.axvline(band.score, color="black", linewidth=1, linestyle=style, label=f"{name}: from {band.score:.1f}")
        axes.set(xlabel="score", ylabel="share of the pairs", xlim=(-30, 100))
        axes.set_title(report.label, parse_math=False)
        axes.legend(loc="upper left", fontsize="small")
    _save(figure, file)


def miss_sheet(report: ModelReport, thumbnail: Thumbnail, file: Path) -> None:
    """A row for each of the worst misses: what was asked, the wrong picture that came first, and the right one."""
    misses = report.worst_misses
    figure = Figure(figsize=(8, 2.6 * len(misses)), layout="constrained")
    figure.suptitle(f"{report.label}: worst misses", parse_math=False)
    for row, miss in zip(figure.subplots(len(misses), 3, squeeze=False), misses, strict=True):
        _show(row[0], thumbnail(Path(miss.query), miss.edit), _asked(miss))
        _show(row[1], thumbnail(Path(miss.wrong), None), f"wrong, {miss.wrong_score:.1f}: {miss.wrong}")
        _show(row[2], thumbnail(Path(miss.right), None), f"right, {miss.right_score:.1f}, {miss.rank}.: {miss.right}")
    _save(figure, file)


def file_name(label: str) -> str:
    """A model's label as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", label)


def _curve(pairs: PairRanking) -> tuple[np.ndarray, np.ndarray]:
    places = np.unique(np.linspace(0, len(pairs.scores) - 1, MOST_POINTS).astype(np.int64))
    return pairs.recall[places], pairs.precision[places]


def _asked(miss: Miss) -> str:
    return f"{miss.edit.value} of {miss.query}" if miss.edit else miss.query


def _show(axes: Axes, picture: Image.Image | None, title: str) -> None:
    axes.set_axis_off()
    if picture is not None:
        axes.imshow(np.asarray(picture))
    short = title if len(title) <= 44 else f"{title[:20]}…{title[-23:]}"
    # Names of files may hold a dollar sign, which would begin a formula.
    axes.set_title(short, fontsize="x-small", parse_math=False)


def _save(figure: Figure, file: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names of files may hold letters that the font has not: boxes stand for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    file.write_bytes(buffer.getvalue())
