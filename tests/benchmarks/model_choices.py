"""What the default model could gain by other pooling, input sizes, scales and projections: docs/evaluation.md holds one run.

python -m tests.benchmarks.model_choices FOLDER [--originals N] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from infra.settings import ProcessorSettings
from processors.embedding.catalog import find
from processors.embedding.embedder import Vectors
from processors.embedding.projection import orthonormal_projection
from processors.training.edits import Edit
from processors.training.evaluate import Evaluation, Trial, run_trial
from processors.training.extraction import ModelUnderTest, open_extractor
from processors.training.measures import Measures, measure
from processors.training.ranking import rank_all
from processors.training.whitening import RunningMoments, oracle_shrinkage, whitening_matrix

GEM_POWERS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
SIZES = (160, 192, 224, 256, 288, 320)
SCALES = ((160, 224), (224, 288), (224, 320), (160, 224, 288), (224, 256, 288, 320))
DIMENSIONS = (512, 256, 128)
WHITENINGS = (0.0, 0.5, 1.0)
MODELS_AT_ONCE = 6
"""Their decode processes and weights are in memory together."""


@dataclass(frozen=True, slots=True)
class Choice:
    label: str
    measures: Measures


def variants(settings: ProcessorSettings) -> list[ModelUnderTest]:
    row = find(settings.model)
    powers = [replace(row, name=f"{row.name}-gem{power:g}", gem_power=power) for power in GEM_POWERS]
    sizes = [replace(row, name=f"{row.name}-{size}", input_size=(size, size)) for size in SIZES]
    both = [
        replace(row, name=f"{row.name}-{size}-gem{power:g}", input_size=(size, size), gem_power=power)
        for size in (256, 288)
        for power in (2.0, 4.0)
    ]
    return [ModelUnderTest(description.name, description, settings) for description in (*powers, *sizes, *both)]


def of_scales(row: str, vectors: dict[str, Vectors], scales: Iterable[int]) -> Vectors:
    """The sum of the vectors of one picture in several sizes, made a unit vector again."""
    return unit(np.sum([vectors[f"{row}-{size}"] for size in scales], axis=0))


def unit(vectors: npt.NDArray[Any]) -> Vectors:
    normalised: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return normalised


def judge(label: str, trial: Trial, queries: Vectors, references: Vectors) -> Choice:
    return Choice(label, measure(rank_all(queries, references, trial.truth)))


async def choices(asked: Evaluation, settings: ProcessorSettings, say: Callable[[str], None]) -> list[Choice]:
    found = []
    queries: dict[str, Vectors] = {}
    references: dict[str, Vectors] = {}
    trial: Trial | None = None
    for start in range(0, len(asked.models), MODELS_AT_ONCE):
        models = asked.models[start : start + MODELS_AT_ONCE]
        async with open_extractor(models, seed=asked.seed, say=say) as extractor:
            trial = await run_trial(asked, extractor, lambda _, __: lambda _: None)
        # Choices measured on different pictures cannot be compared.
        say(f"{len(trial.queries)} queries, {len(trial.references)} pictures, left out: {dict(trial.refused)}")
        queries |= trial.query_vectors
        references |= trial.reference_vectors
        for model in models:
            found.append(judge(model.label, trial, queries[model.label], references[model.label]))
            say(f"{model.label}: {found[-1].measures.micro_average_precision:.4f}")
    assert trial is not None
    for scales in SCALES:
        both = [of_scales(settings.model, vectors, scales) for vectors in (queries, references)]
        found.append(judge(f"scales {'+'.join(map(str, scales))}", trial, *both))
    return found + list(of_projections(trial, queries[f"{settings.model}-gem3"], references[f"{settings.model}-gem3"]))


def of_projections(trial: Trial, queries: Vectors, references: Vectors) -> Iterator[Choice]:
    """Fitted on all pictures, and on those that no query was made of, if there are enough of them."""
    columns = references.shape[1]
    for dimension in DIMENSIONS:
        # The next power of two; what is behind the vectors' floats is 0.
        fixed = orthonormal_projection("resnet50/1", dimension, 1 << (columns - 1).bit_length())[:, :columns]
        yield judge(f"{dimension}, fixed", trial, *(unit(vectors @ fixed.T) for vectors in (queries, references)))
    unseen = ~np.isin(trial.truth.reference_groups, trial.truth.query_groups)
    for title, rows in (("fitted", references), ("fitted on others", references[unseen])):
        moments = RunningMoments(columns)
        moments.add(rows)
        for dimension, whitening in product(DIMENSIONS, WHITENINGS):
            if len(rows) > dimension:
                shrinkage = oracle_shrinkage(moments)
                matrix = whitening_matrix(moments, dimension, whitening=whitening, shrinkage=shrinkage).matrix
                turned = [unit((vectors - moments.mean) @ matrix.T) for vectors in (queries, references)]
                yield judge(f"{dimension}, {title}, whitening {whitening:g}", trial, *turned)


def show(title: str, found: list[Choice], console: Console) -> None:
    table = Table("choice", "recall@1", "mAP", "µAP", "likely from", "pairs found", title=title)
    for choice in found:
        measures = choice.measures
        band = measures.likely
        table.add_row(
            choice.label,
            f"{100 * measures.recall_at[1]:.1f}",
            f"{100 * measures.mean_average_precision:.1f}",
            f"{100 * measures.micro_average_precision:.1f}",
            f"{band.score:.1f}" if band else "–",
            f"{100 * band.recall:.1f}" if band else "–",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--originals", type=int, default=150)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    settings, console = ProcessorSettings(), Console()
    models = variants(settings)
    trials = {
        "edited copies": Evaluation(source=arguments.folder, models=models, edits=tuple(Edit), originals=arguments.originals),
        "folders": Evaluation(source=arguments.folder, models=models),
    }
    document = {}
    for title, asked in trials.items():
        found = asyncio.run(choices(asked, settings, console.print))
        show(title, found, console)
        document[title] = {choice.label: choice.measures.model_dump() for choice in found}
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
