"""`image-search models`: look at the models, and change the active one while it goes on answering."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from infra.errors import ConfigurationError
from infra.settings import CommonSettings, load
from schemas.jobs import ModelArguments, ReindexArguments
from schemas.tables import JobKind, JobState

FOLLOW_SECONDS = 0.5
NOBODY_SECONDS = 20.0


@click.group()
def models() -> None:
    """Show models, and change the active one without a gap: reindex, compare, activate, and drop or roll back."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def list_models(context: click.Context, as_json: bool) -> None:
    """Print the models: state, name, precision, dimension, and how many indexed objects each holds a vector of."""
    rows = asyncio.run(_list(_settings(context)))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("state", "name", "fingerprint", "precision", "floats", "filled")
    for row in rows:
        filled = f"{row['filled']} of {row['indexed']}"
        table.add_row(row["state"], row["name"], row["fingerprint"][:12], row["precision"], str(row["dimension"]), filled)
    Console().print(table)


async def _list(settings: CommonSettings) -> list[dict[str, Any]]:
    from infra import metadata_store

    metadata = await metadata_store.connect(settings)
    try:
        found = []
        for row in await metadata.models():
            filled, indexed = await metadata.model_coverage(row.fingerprint)
            found.append(
                {
                    "state": row.state,
                    "name": row.name,
                    "fingerprint": row.fingerprint,
                    "precision": row.precision,
                    "dimension": row.dimension,
                    "collection": row.collection,
                    "filled": filled,
                    "indexed": indexed,
                }
            )
        return found
    finally:
        await metadata.close()


@models.command()
@click.argument("name")
@click.option("--precision", help="Precision of the new model. Without it: the worker's setting.")
@click.option("--calibration", help="int8: sha256 of the pictures it was calibrated on elsewhere.")
@click.option("--weights", help="Model own: its weights, a path, s3://bucket/key or an https address.")
@click.option("--sha256", help="Digest of the weights, where the catalog does not know it.")
@click.option("--network", help="Model own: the network that the weights are of.")
@click.option("--input-pixels", type=int, help="Model own: height and width of its input.")
@click.option(
    "--projection", help="A projection by fit-projection: a path, s3://bucket/key or an https address. Default: none."
)
@click.option("--projection-sha256", help="Digest of the projection's file.")
@click.option("--projection-dimension", type=int, help="Floats of a vector that the projection makes.")
@click.pass_context
def reindex(
    context: click.Context,
    name: str,
    precision: str | None,
    calibration: str | None,
    weights: str | None,
    sha256: str | None,
    network: str | None,
    input_pixels: int | None,
    projection: str | None,
    projection_sha256: str | None,
    projection_dimension: int | None,
) -> None:
    """Fill a second collection with the model NAME while the active one answers. Asked again, it goes on where it was."""
    asked = ReindexArguments(
        model=name,
        model_precision=precision,
        calibration_sha256=calibration or "",
        own_weights=weights,
        weights_sha256=sha256,
        own_network=network,
        own_input_pixels=input_pixels,
        projection=projection,
        projection_sha256=projection_sha256,
        projection_dimension=projection_dimension,
    )
    _run(context, JobKind.REINDEX, asked)


@models.command()
@click.argument("model")
@click.pass_context
def compare(context: click.Context, model: str) -> None:
    """Compare MODEL with the active one, over pictures of the index. For labelled pictures there is image-search evaluate."""
    _run(context, JobKind.COMPARE, ModelArguments(model=model))


@models.command()
@click.argument("model")
@click.pass_context
def activate(context: click.Context, model: str) -> None:
    """Let MODEL answer from now on, if bucket, rows and its collection are equal. The active one is kept as the previous."""
    _run(context, JobKind.ACTIVATE, ModelArguments(model=model))


@models.command()
@click.pass_context
def rollback(context: click.Context) -> None:
    """Let the previous model answer again. It was kept equal to the bucket all the time."""
    name = asyncio.run(_roll_back(_settings(context)))
    click.echo(f"{name} answers again; every query service sees it within a second")


async def _roll_back(settings: CommonSettings) -> str:
    from infra import metadata_store
    from infra.model_table import roll_back

    metadata = await metadata_store.connect(settings)
    try:
        return (await roll_back(metadata)).name
    finally:
        await metadata.close()


@models.command()
@click.argument("model")
@click.pass_context
def drop(context: click.Context, model: str) -> None:
    """Keep MODEL no more, and remove its collection. The active one is refused."""
    _run(context, JobKind.DROP, ModelArguments(model=model))


def _run(context: click.Context, kind: JobKind, arguments: BaseModel) -> None:
    state, message = asyncio.run(_job(_settings(context), kind, arguments))
    click.echo(message)
    sys.exit(0 if state is JobState.DONE else 1)


async def _job(settings: CommonSettings, kind: JobKind, arguments: BaseModel) -> tuple[JobState, str]:
    from infra import metadata_store
    from infra.jobs import ask

    metadata = await metadata_store.connect(settings)
    try:
        await metadata.check()
        job = await ask(metadata, kind, arguments)
        patient_until = time.monotonic() + NOBODY_SECONDS
        said = ""
        while job.state in (JobState.QUEUED, JobState.RUNNING):
            if job.state is JobState.QUEUED and time.monotonic() > patient_until:
                return job.state, "no worker has taken this up yet; it is done as soon as one is free"
            if (line := _progress_line(job.progress)) and line != said:
                click.echo(said := line, err=True)
            await asyncio.sleep(FOLLOW_SECONDS)
            job = await metadata.job(job.job_id) or job
        return job.state, job.message or job.state
    finally:
        await metadata.close()


def _progress_line(progress: Mapping[str, Any]) -> str:
    if "phase" not in progress:
        return ""
    eta = progress.get("eta_seconds")
    left = f", about {eta:.0f} s left" if eta else ""
    return f"{progress['phase']}: {progress.get('filled', 0)} of {progress.get('to_fill') or '?'}{left}"


def _settings(context: click.Context) -> CommonSettings:
    state_dir = context.find_object(Path)
    if state_dir is None:
        raise ConfigurationError("run this as a command of image-search")
    return load(CommonSettings, state_dir=state_dir)
