"""What an evaluation says: one JSON document, and tables for people."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from processors.embedding.catalog import fingerprint
from processors.embedding.choice import precision_asked
from processors.training.edits import Edit
from processors.training.extraction import ModelUnderTest
from processors.training.measures import KindMeasures, Measures
from schemas.identity import ModelFingerprint


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class Miss(_Document):
    """A query whose first hit was wrong: its file, the hit's and the right one's. `rank`: of the right one."""

    query: str
    edit: Edit | None
    wrong: str
    wrong_score: float
    right: str
    right_score: float
    rank: int


class ModelReport(_Document):
    """`kinds`: by edit, where copies were made."""

    label: str
    fingerprint: ModelFingerprint
    dimension: int
    input_size: tuple[int, int]
    backend: str
    precision: str
    measures: Measures
    kinds: dict[str, KindMeasures]
    worst_misses: list[Miss]

    @classmethod
    def of(
        cls, model: ModelUnderTest, measures: Measures, kinds: dict[str, KindMeasures], worst_misses: list[Miss]
    ) -> ModelReport:
        return cls(
            label=model.label,
            fingerprint=fingerprint(model.description, precision_asked(model.settings)),
            dimension=model.description.dimension,
            input_size=model.description.input_size,
            backend=model.settings.model_backend,
            precision=precision_asked(model.settings),
            measures=measures,
            kinds=kinds,
            worst_misses=worst_misses,
        )


class EvaluationReport(_Document):
    """`refused`: how many pictures and copies were left out, by reason code."""

    source: str
    distractors: list[str]
    edits: list[Edit]
    seed: int
    queries: int
    references: int
    refused: dict[str, int]
    models: list[ModelReport]


def show(report: EvaluationReport, console: Console) -> None:
    how = "edited copies" if report.edits else "pictures"
    console.print(f"{report.queries} {how} against {report.references} pictures")
    for reason, number in report.refused.items():
        console.print(f"left out: {number} × {reason}")
    console.print(_models_table(report))
    if report.edits:
        console.print(_kinds_table(report))


def _models_table(report: EvaluationReport) -> Table:
    """A column for each model, so that a few fit side by side."""
    table = Table("measure", *(model.label for model in report.models), title="Models")
    measures = [model.measures for model in report.models]
    for k in measures[0].recall_at:
        table.add_row(f"recall@{k}", *(_percent(of.recall_at[k]) for of in measures))
    table.add_row("mAP", *(_percent(of.mean_average_precision) for of in measures))
    table.add_row("µAP", *(_percent(of.micro_average_precision) for of in measures), end_section=True)
    for name, bands in (("surely the same", [of.surely for of in measures]), ("likely", [of.likely for of in measures])):
        table.add_row(f"{name}: score from", *(f"{band.score:.1f}" if band else "–" for band in bands))
        table.add_row("  right pairs found", *(_percent(band.recall) if band else "–" for band in bands))
    return table


def _kinds_table(report: EvaluationReport) -> Table:
    title = "Edits: recall@1, and the share of copies that are at least likely"
    table = Table("edit", *(model.label for model in report.models), title=title)
    for edit in report.edits:
        table.add_row(edit.value, *(_kind(model.kinds.get(edit)) for model in report.models))
    return table


def _kind(kind: KindMeasures | None) -> str:
    if kind is None:
        return "–"
    return f"{_percent(kind.recall_at_1)}, {_percent(kind.likely) if kind.likely is not None else '–'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
