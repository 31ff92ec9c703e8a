"""`image-search evaluate`, `image-search fit-projection` and `image-search finetune`."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from processors.training.evaluate import Evaluated
    from processors.training.extraction import ModelUnderTest
    from schemas.identity import ObjectRef

EDITS = ("crop", "resize", "jpeg", "blur", "overlay", "text", "flip", "rotate", "colour", "screenshot")
"""The names of edits.Edit, which a test compares: help must not wait for Pillow."""

DEFAULT_WHITENING = 0.5
"""Measured: docs/evaluation.md."""

_path = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("source", type=_path)
@click.option("--model", "models", multiple=True, metavar="NAME[:PRECISION]", help="May be given several times, to compare.")
@click.option(
    "--projection",
    "projections",
    type=_path,
    multiple=True,
    metavar="FILE",
    help="The model that this projection was fitted for, with it beside it without; repeatable.",
)
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
    projections: tuple[Path, ...],
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
        models=_with_projections(_models_under_test(models, context), projections),
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


@click.command()
@click.argument("source", type=_path)
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="For the weights; a run goes on there."
)
@click.option("--model", "name", metavar="NAME", help="What to begin with. Default: the model of the settings.")
@click.option("--edits", "all_edits", is_flag=True, help="Learn from copies, labels are not needed. Edits of all kinds.")
@click.option("--edit", "edits", type=click.Choice(EDITS), multiple=True, help="The same with this kind only; repeatable.")
@click.option("--at-once", type=click.IntRange(1, len(EDITS)), default=2, show_default=True, help="Most edits of one copy.")
@click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="Times that all pictures are seen.")
@click.option("--batch-size", type=click.IntRange(min=4), default=32, show_default=True, help="Pictures or copies a step.")
@click.option("--of-a-group", type=click.IntRange(min=2), default=2, show_default=True, help="With labels: of each, a step.")
@click.option(
    "--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4, show_default=True, help="AdamW's, at its highest."
)
@click.option(
    "--temperature", type=click.FloatRange(0, min_open=True), default=0.05, show_default=True, help="With copies: of InfoNCE."
)
@click.option("--entropy", type=click.FloatRange(0), help="Weight of the entropy term. Default: 5 with copies, 0 with labels.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9, min_open=True),
    default=0.2,
    show_default=True,
    help="Share that recall is told by.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of all that is drawn by chance.")
@click.option(
    "--checkpoint-steps", type=click.IntRange(min=1), default=50, show_default=True, help="Most steps that a kill can cost."
)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(("auto", "fp32", "bf16")), default="auto", show_default=True)
@click.pass_context
def finetune(
    context: click.Context,
    /,
    *,
    source: Path,
    output: Path,
    name: str | None,
    all_edits: bool,
    edits: tuple[str, ...],
    entropy: float | None,
    **choices: Any,
) -> None:
    """Teach a model on the pictures of SOURCE: a folder with a folder for each group, or a CSV file (file,group).

    Pictures of one group become near each other. With --edits no groups are needed: copies of one picture do. The epoch that
    finds held-out pictures best is kept. The same command again goes on where it was ended. Needs no running servers.
    """
    from rich.console import Console

    from infra.progress import shown_on
    from infra.settings import DEFAULT_STATE_DIR, ProcessorSettings, load
    from processors.training.edits import Edit

    console = Console(stderr=True, markup=False, highlight=False)
    copies = all_edits or bool(edits)
    if choices["of_a_group"] > choices["batch_size"] // 2:
        raise ConfigurationError("--of-a-group: a step needs pictures of two groups: at most half of --batch-size")
    settings = load(ProcessorSettings, state_dir=context.find_object(Path) or DEFAULT_STATE_DIR)
    # By its name, so without a fitted projection: that is of the weights it was fitted on. What it learns in is --precision.
    (model,) = _models_under_test((f"{name or settings.model}:fp32",), context)
    try:
        from processors.training.finetune import FineTuning
        from processors.training.finetune import finetune as run
    except ImportError as error:
        raise ConfigurationError(
            f"fine-tuning needs a package that is not installed ({error.name}): pip install 'image-search[training]'"
        ) from None
    asked = FineTuning(
        source=source,
        model=model,
        output=output,
        copies=copies,
        edits=tuple(Edit(name) for name in dict.fromkeys(edits)) if edits and not all_edits else tuple(Edit),
        entropy_weight=(5.0 if copies else 0.0) if entropy is None else entropy,
        **choices,
    )
    try:
        with shown_on(console) as progress:
            done = asyncio.run(run(asked, progress, console.print))
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written to: {error.strerror}") from None
    if not done.better:
        console.print("None of the epochs is better than the model it began with: keep that one.")
    console.print(f"{done.weights}\nsha256 {done.sha256}\n{done.card}\n\nTo use it:")
    for variable, value in done.settings.items():
        click.echo(f"export {variable}={shlex.quote(value)}")


def _models_under_test(names: tuple[str, ...], context: click.Context) -> list[ModelUnderTest]:
    """Without a name the model of the settings. A precision that is not named is that of the settings."""
    from functools import partial

    from infra.settings import DEFAULT_STATE_DIR, ProcessorSettings, load
    from processors.embedding.catalog import OWN_MODEL, find, fingerprint
    from processors.embedding.choice import chosen, precision_asked
    from processors.embedding.fastest import decided
    from processors.embedding.host import check_host
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
        if names:
            # Nor is the projection that they name; --projection finds the model that it is of.
            given |= {"projection": "", "projection_sha256": "", "projection_dimension": 0}
        settings = load(ProcessorSettings, state_dir=state_dir, **given)
        # No server is asked: without a folder or a digest, int8 is calibrated on the pictures that come with the program.
        settings = asyncio.run(decided(settings, (), partial(click.echo, err=True)))
        description = chosen(settings)
        # Before other models are loaded: does it come in that precision, and can this host run it?
        fingerprint(description, precision_asked(settings))
        check_host(settings, precision_asked(settings))
        models.append(ModelUnderTest(label, description, settings))
    return models


def _with_projections(models: list[ModelUnderTest], files: tuple[Path, ...]) -> list[ModelUnderTest]:
    from dataclasses import replace

    from processors.embedding.catalog import fingerprint
    from processors.embedding.choice import projected
    from processors.embedding.projection_file import read_any_projection
    from processors.embedding.weights import file_digest

    found = list(models)
    for file in files:
        facts = read_any_projection(file).facts
        of_it = [one for one in models if fingerprint(one.description.unprojected(), "fp32") == facts.parent]
        if not of_it:
            raise ConfigurationError(
                f"{file} was fitted for {facts.model} ({facts.parent[:16]}), which is not measured: --model"
            )
        for model in of_it:
            description = projected(model.description, str(file), file_digest(file), facts.dimension)
            label = f"{model.label}+{file.stem}"
            if any(one.label == label for one in found):
                raise ConfigurationError(f"two projections are called {file.stem}: give one of them another name")
            found.append(replace(model, label=label, description=description))
    return found


@click.command(name="fit-projection")
@click.argument("source", metavar="SOURCE")
@click.option("--dimension", type=click.IntRange(min=1), default=512, show_default=True, help="Floats of a vector.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("projection.safetensors"),
    show_default=True,
    help="The file that is written.",
)
@click.option(
    "--whitening",
    type=click.FloatRange(0, 1),
    default=DEFAULT_WHITENING,
    show_default=True,
    help="0: keep the strongest directions as they are; 1: make all equally strong.",
)
@click.option(
    "--shrinkage", type=click.FloatRange(0, 1), help="Draw the directions' strength to their mean. Default: by the count."
)
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Take one picture of so many.")
@click.pass_context
def fit_projection(
    context: click.Context,
    *,
    source: str,
    dimension: int,
    output: Path,
    whitening: float,
    shrinkage: float | None,
    every: int,
) -> None:
    """Fit a projection to fewer floats on the pictures of SOURCE: a folder, a CSV file, or s3://bucket or s3://bucket/prefix.

    For the model of the settings. Prints what to set so that the model is used with it, which is another fingerprint, so
    another collection. Needs no running servers but the bucket.
    """
    from rich.console import Console

    from infra.settings import DEFAULT_STATE_DIR, ProcessorSettings, load
    from processors.embedding.choice import chosen, precision_asked
    from processors.embedding.host import check_host
    from processors.embedding.projection_file import write_projection
    from processors.embedding.weights import file_digest
    from processors.training.fit_projection import Fit, fit

    settings = load(ProcessorSettings, state_dir=context.find_object(Path) or DEFAULT_STATE_DIR)
    if settings.model_precision != "bf16":
        # What `auto` finds is not known yet, and int8 is calibrated on what the projection will give.
        settings = settings.model_copy(update={"model_precision": "fp32", "calibration_sha256": ""})
    check_host(settings, precision_asked(settings))
    asked = Fit(source=_pictures_of(source), dimension=dimension, whitening=whitening, shrinkage=shrinkage, every=every)
    if not output.parent.is_dir():
        raise ConfigurationError(f"--output: there is no folder {output.parent}")
    aside = Console(stderr=True, markup=False, highlight=False)
    with _count(aside) as advance:
        fitted = asyncio.run(fit(asked, chosen(settings), settings, advance, aside.print))
    try:
        write_projection(output, fitted.projection)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}") from None
    facts = fitted.projection.facts
    left_out = "".join(f", left out {number} × {reason}" for reason, number in sorted(fitted.refused.items()))
    aside.print(
        f"{facts.model}: {facts.columns} to {facts.dimension} floats, fitted on {facts.pictures} pictures{left_out}; "
        f"{100 * fitted.kept:.1f} % of the variance kept, shrinkage {facts.shrinkage:.3f}",
        soft_wrap=True,
    )
    if facts.pictures < facts.columns:
        aside.print(f"fewer pictures than the model has floats ({facts.columns}): more would make it better")
    place, digest = output.resolve(), file_digest(output)
    change = f"image-search models reindex {facts.model} --projection {shlex.quote(str(place))}"
    change += f" --projection-sha256 {digest} --projection-dimension {facts.dimension}"
    aside.print(
        f"To change to it while the index goes on answering:\n{change}\nTo use it for a new collection:", soft_wrap=True
    )
    click.echo(f"IMAGE_SEARCH_PROJECTION={place}")
    click.echo(f"IMAGE_SEARCH_PROJECTION_SHA256={digest}")
    click.echo(f"IMAGE_SEARCH_PROJECTION_DIMENSION={facts.dimension}")


def _pictures_of(source: str) -> Path | ObjectRef:
    from schemas.identity import ObjectRef

    if source.startswith("s3://"):
        bucket, _, prefix = source.removeprefix("s3://").partition("/")
        if bucket:
            return ObjectRef(bucket, prefix)
    elif Path(source).exists():
        return Path(source)
    raise ConfigurationError(f"{source} is no folder, no file, and not s3://bucket or s3://bucket/prefix")


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


@contextmanager
def _count(console: Console) -> Iterator[Callable[[int], None]]:
    """How many pictures are done, of how many nobody knows before a bucket was listed."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("pictures", total=None)
        yield lambda steps: bars.advance(task, steps)
