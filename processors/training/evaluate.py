"""How well models find what they should: on pictures whose groups are known, or on edited copies among distractors."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from infra.errors import ConfigurationError
from infra.progress import Progress
from processors.embedding.embedder import Vectors
from processors.training.edits import Edit
from processors.training.extraction import Extracted, Extractor, ModelUnderTest, Sample, open_extractor
from processors.training.labelled import LabelledPicture, labelled_pictures
from processors.training.measures import KindMeasures, measure, measure_kind
from processors.training.ranking import NOBODY, GroundTruth, QueryResults, Ranking, rank_all
from processors.training.report import EvaluationReport, Miss, ModelReport

WORST_MISSES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is asked. With `edits`: copies of the source's pictures shall find their originals. Without: each picture of a
    group shall find the others. `distractors`: more folders or lists whose pictures are right for nobody.
    `originals`: of how many pictures, drawn by `seed`, copies are made; None: of all."""

    source: Path
    models: Sequence[ModelUnderTest]
    edits: tuple[Edit, ...] = ()
    distractors: tuple[Path, ...] = ()
    originals: int | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Vectors of all models for the same queries and references, and what is right."""

    queries: list[Sample]
    references: list[Sample]
    query_vectors: dict[str, Vectors]
    reference_vectors: dict[str, Vectors]
    truth: GroundTruth
    refused: Counter[str]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """The report, and what its plots are drawn from."""

    report: EvaluationReport
    rankings: dict[str, Ranking]
    queries: list[Sample]
    references: list[Sample]


async def evaluate(asked: Evaluation, progress: Progress, say: Callable[[str], None]) -> Evaluated:
    """Raises ConfigurationError when there is nothing to measure."""
    async with open_extractor(asked.models, seed=asked.seed, say=say) as extractor:
        trial = await run_trial(asked, extractor, progress)
    rankings = {}
    reports = []
    for model in asked.models:
        advance = progress(f"ranking by {model.label}", 2 * len(trial.queries))
        rankings[model.label] = await asyncio.to_thread(
            rank_all,
            trial.query_vectors[model.label],
            trial.reference_vectors[model.label],
            trial.truth,
            advance=advance,
        )
        reports.append(_model_report(model, rankings[model.label], trial, asked.edits))
    report = EvaluationReport(
        source=str(asked.source),
        distractors=[str(path) for path in asked.distractors],
        edits=list(asked.edits),
        seed=asked.seed,
        queries=len(trial.queries),
        references=len(trial.references),
        refused=dict(sorted(trial.refused.items())),
        models=reports,
    )
    return Evaluated(report, rankings, trial.queries, trial.references)


async def run_trial(asked: Evaluation, extractor: Extractor, progress: Progress) -> Trial:
    """Every picture through every model. Raises ConfigurationError when nothing is right for any query."""
    pictures = await asyncio.to_thread(labelled_pictures, asked.source)
    # Whatever group they are of elsewhere, here they belong to nobody.
    apart = [
        LabelledPicture(picture.path, None)
        for folder in asked.distractors
        for picture in await asyncio.to_thread(labelled_pictures, folder)
    ]
    everything = [Sample(picture) for picture in (*pictures, *apart)]
    found = await extractor.extract(everything, progress("pictures", len(everything)))
    references = [everything[place] for place in found.kept]
    if asked.edits:
        trial = await _copies(asked, extractor, progress, references, found, of_source=len(pictures))
    else:
        trial = _groups(references, found, of_source=len(pictures))
    if not any(np.isin(trial.truth.query_groups, _groups_with_answers(trial.truth))):
        raise ConfigurationError(
            f"{asked.source}: no picture has another one to be found by. Give folders (or groups in a CSV file) of two "
            "pictures or more, or let copies be made: --edits"
        )
    return trial


def _groups(references: list[Sample], found: Extracted, *, of_source: int) -> Trial:
    names = {name: number for number, name in enumerate(sorted({s.picture.group for s in references if s.picture.group}))}
    groups = np.array([names.get(sample.picture.group or "", NOBODY) for sample in references], dtype=np.int64)
    # Distractors ask nothing.
    asking = [row for row, place in enumerate(found.kept) if place < of_source]
    return Trial(
        queries=[references[row] for row in asking],
        references=references,
        query_vectors={label: vectors[asking] for label, vectors in found.vectors.items()},
        reference_vectors=found.vectors,
        truth=GroundTruth(groups[asking], groups, np.array(asking, dtype=np.int64)),
        refused=found.refused,
    )


async def _copies(
    asked: Evaluation,
    extractor: Extractor,
    progress: Progress,
    references: list[Sample],
    found: Extracted,
    *,
    of_source: int,
) -> Trial:
    # The same bytes under two names are one picture: either is right.
    contents = {digest: number for number, digest in enumerate(dict.fromkeys(found.digests))}
    groups = np.array([contents[digest] for digest in found.digests], dtype=np.int64)
    originals = [row for row, place in enumerate(found.kept) if place < of_source]
    if asked.originals is not None and asked.originals < len(originals):
        # Not for secrets.
        originals = sorted(random.Random(asked.seed).sample(originals, asked.originals))  # noqa: S311
    wanted = [(row, Sample(references[row].picture, (edit,))) for row in originals for edit in asked.edits]
    copies = await extractor.extract([copy for _, copy in wanted], progress("edited copies", len(wanted)))
    kept = [wanted[place] for place in copies.kept]
    return Trial(
        queries=[copy for _, copy in kept],
        references=references,
        query_vectors=copies.vectors,
        reference_vectors=found.vectors,
        truth=GroundTruth(
            query_groups=groups[[row for row, _ in kept]],
            reference_groups=groups,
            own=np.full(len(kept), NOBODY, dtype=np.int64),
        ),
        refused=found.refused + copies.refused,
    )


def _groups_with_answers(truth: GroundTruth) -> list[int]:
    members = Counter(truth.reference_groups.tolist())
    # A query that is a reference itself needs another one.
    least = 1 if len(truth.own) and truth.own[0] == NOBODY else 2
    return [group for group, number in members.items() if group != NOBODY and number >= least]


def _model_report(model: ModelUnderTest, ranking: Ranking, trial: Trial, edits: Sequence[Edit]) -> ModelReport:
    measures = measure(ranking)
    kinds: dict[str, KindMeasures] = {}
    made_by = np.array([sample.edit or "" for sample in trial.queries])
    for edit in edits:
        of_kind = measure_kind(ranking.queries, made_by == edit, measures.likely)
        if of_kind is not None:
            kinds[edit] = of_kind
    return ModelReport.of(model, measures, kinds, worst_misses(ranking.queries, trial.queries, trial.references))


def worst_misses(results: QueryResults, queries: Sequence[Sample], references: Sequence[Sample]) -> list[Miss]:
    """Queries whose first hit is wrong, those first where it is furthest above the best right one."""
    missed = np.flatnonzero(results.rank > 1)
    margins = results.best_wrong_score[missed] - results.best_right_score[missed]
    worst = missed[np.argsort(-margins, kind="stable")][:WORST_MISSES]
    return [
        Miss(
            query=str(queries[query].picture.path),
            edit=queries[query].edit,
            wrong=str(references[results.best_wrong[query]].picture.path),
            wrong_score=float(results.best_wrong_score[query]),
            right=str(references[results.best_right[query]].picture.path),
            right_score=float(results.best_right_score[query]),
            rank=int(results.rank[query]),
        )
        for query in worst
    ]
