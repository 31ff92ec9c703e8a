"""`image-search evaluate`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infra.errors import ConfigurationError

if TYPE_CHECKING:
    from processors.training.evaluate import Evaluated
    from processors.training.extraction import ModelUnderTest

EDITS = ("crop", "resize", "jpeg", "blur", "overlay", "text", "flip", "rotate", "colour", "screenshot")
"""The names of edits.Edit, which a test compares: help must not wait for Pillow."""

_path = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("source", type=_path)
@click.option("--model", "models", multiple=True, metavar="NAME[:PRECISION]", help="May be given several times, to compare.")
@click.option("--edits", "all_edits", is_flag=True, help="Make edited copies; they shall find their originals. All kinds.")
@click.option("--edit", "edits", type=click.Choice(EDITS), multiple=True, help="The same with this kind only; repeatable.")
@click.option("--originals", type=click.IntRange(min=1), help="Make copies of so many pictures, drawn by chance. Default: all.")
@click.option("--distractors", type=_path, multiple=True, help="More pictures, which are right for nobody; repeatable.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed makes the same copies.")
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder that evaluation.json and plots are written to."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of the tables.")
@click.pass_context
def evaluate(
    context: click.Context,
    *,
    source: Path,
    models: tuple[str, ...],
    all_edits: bool,
    edits: tuple[str, ...],
    originals: int | None,
    distractors: tuple[Path, ...],
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure how well models find pictures of SOURCE: a folder with a folder for each group, or a CSV file (file,group).

    Each picture shall find the others of its group; with --edits, edited copies shall find the picture they were made of.
    Needs no running servers.
    """
    from rich.console import Console

    from infra.progress import shown_on
    from processors.training.edits import Edit
    from processors.training.evaluate import Evaluation
    from processors.training.evaluate import evaluate as run
    from processors.training.report import show

    if output is not None:
        _make_ready(output)
    if originals is not None and not (all_edits or edits):
        raise ConfigurationError("--originals says how many pictures copies are made of: give --edits or --edit, too")
    asked = Evaluation(
        source=source,
        models=_models_under_test(models, context),
        edits=tuple(Edit) if all_edits else tuple(Edit(name) for name in dict.fromkeys(edits)),
        distractors=distractors,
        originals=originals,
        seed=seed,
    )
    console, aside = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))
    with shown_on(aside) as progress:
        evaluated = asyncio.run(run(asked, progress, aside.print))
    if as_json:
        click.echo(evaluated.report.model_dump_json(indent=2))
    else:
        show(evaluated.report, console)
    if output is not None:
        _write(evaluated, asked.models, output)
        aside.print(f"evaluation.json and plots are in {output}")


def _models_under_test(names: tuple[str, ...], context: click.Context) -> list[ModelUnderTest]:
    """Without a name the model of the settings. A precision that is not named is that of the settings."""
    from functools import partial

    from infra.settings import DEFAULT_STATE_DIR, ProcessorSettings, load
    from processors.embedding.catalog import OWN_MODEL, find, fingerprint
    from processors.embedding.choice import chosen, precision_asked
    from processors.embedding.fastest import decided
    from processors.embedding.host import check_precision
    from processors.training.extraction import ModelUnderTest

    state_dir = context.find_object(Path) or DEFAULT_STATE_DIR
    models = []
    for label in dict.fromkeys(names or (load(ProcessorSettings, state_dir=state_dir).model,)):
        name, _, precision = label.partition(":")
        given: dict[str, object] = {"model": name, **({"model_precision": precision} if precision else {})}
        # What the settings say of a checkpoint of one's own is not about the model beside it.
        if name != OWN_MODEL:
            given["own_weights"] = ""
            given |= {"weights_sha256": ""} if find(name).weights.sha256 else {}
        settings = load(ProcessorSettings, state_dir=state_dir, **given)
        # No server is asked: without a folder or a digest, int8 is calibrated on the pictures that come with the program.
        settings = asyncio.run(decided(settings, (), partial(click.echo, err=True)))
        description = chosen(settings)
        # Before other models are loaded: does it come in that precision, and can this host run it?
        fingerprint(description, precision_asked(settings))
        check_precision(precision_asked(settings))
        models.append(ModelUnderTest(label, description, settings))
    return models


def _make_ready(output: Path) -> None:
    """Before an hour of work: can plots be drawn, and can anything be written there?"""
    try:
        import processors.training.plots  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"plots need a package that is not installed ({error.name}): pip install 'image-search[training]', or leave out "
            "--output"
        ) from None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be made: {error.strerror}") from None


def _write(evaluated: Evaluated, models: Sequence[ModelUnderTest], output: Path) -> None:
    from functools import partial

    from processors.training import plots
    from processors.training.copies import thumbnail

    report, rankings = evaluated.report, evaluated.rankings
    try:
        (output / "evaluation.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        plots.precision_recall(rankings, output / "precision-recall.png")
        plots.score_histograms(report.models, rankings, output / "scores.png")
        for model, of_model in zip(models, report.models, strict=True):
            draw = partial(thumbnail, seed=report.seed, rules=model.description.decode_rules(model.settings))
            sheet = output / f"misses-{plots.file_name(of_model.label)}.png"
            # An earlier evaluation may have left one.
            sheet.unlink(missing_ok=True)
            if of_model.worst_misses:
                plots.miss_sheet(of_model, draw, sheet)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written to: {error.strerror}") from None
