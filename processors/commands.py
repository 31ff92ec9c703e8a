"""`image-search worker`, `failures` and what trains, and the processors' part of `image-search upgrade`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from infra.errors import ConfigurationError
from infra.settings import CommonSettings, ProcessorSettings, load
from processors.model_commands import models
from processors.training.commands import evaluate, finetune, fit_projection
from schemas.events import ReasonCode
from schemas.jobs import JobPlace, RetryArguments
from schemas.tables import JobKind, ModelState, RowState
from schemas.topics import DEAD_LETTERS, HEADER_ERROR, HEADER_OFFSET, HEADER_PARTITION, HEADER_REASON, HEADER_TOPIC

FAILED_ROWS_PAGE = 1000


async def upgrade_step(settings: ProcessorSettings, say: Callable[[str], None]) -> None:
    """Convert the model, make its collection, and note the choice: from then on it is checked at every start."""
    import time

    from infra import metadata_store, vector_store
    from infra.followed_buckets import followed_buckets
    from infra.metadata_store.interface import ModelRow
    from processors.embedding import prepare_model
    from processors.embedding.active_model import active_model, settled
    from processors.embedding.catalog import fingerprint
    from processors.embedding.choice import chosen, precision_asked
    from processors.embedding.fastest import decided
    from schemas.vectors import collection_name

    metadata = await metadata_store.connect(settings)
    vectors = await vector_store.connect(settings)
    try:
        made_before = bool(await metadata.models([ModelState.ACTIVE]))
        if made_before:
            settings = await settled(settings, metadata)
        else:
            settings = await decided(settings, await followed_buckets(settings, metadata), say)
        asked = fingerprint(chosen(settings), precision_asked(settings))
        model = await active_model(metadata, asked, settings.model) if made_before else None
        prepared = await prepare_model(settings, say)
        if model is None:
            model = ModelRow(
                fingerprint=prepared.fingerprint,
                name=prepared.description.name,
                collection=collection_name(prepared.fingerprint, settings.milvus_collection_prefix),
                dimension=prepared.description.dimension,
                backend=settings.model_backend,
                precision=precision_asked(settings),
                description=asdict(prepared.description),
                state=ModelState.ACTIVE,
                created_at_us=time.time_ns() // 1000,
            )
        # The collection first: a row that names a collection promises that it is there.
        await vectors.create_collection(model.collection, dimension=model.dimension)
        await metadata.add_model(model)
        how = f"{model.backend}, {model.precision}, {model.dimension} floats"
        say(f"model {model.name} ({how}) in collection {model.collection}")
    finally:
        await vectors.close()
        await metadata.close()


@click.command()
@click.pass_context
def worker(context: click.Context) -> None:
    """Run a worker: embeds new objects and keeps rows and vectors equal to the buckets."""
    from infra.telemetry import configure_logging
    from infra.tracing import traces
    from processors.app import run

    settings = load(ProcessorSettings, state_dir=_state_dir(context))
    configure_logging(settings, "worker")
    with traces(settings, "worker"):
        status = asyncio.run(run(settings))
    sys.exit(status)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--retry", is_flag=True, help="Have them tried again, instead of listing them.")
@click.option("--reason", type=click.Choice([reason.value for reason in ReasonCode]), help="With --retry: only those.")
@click.pass_context
def failures(context: click.Context, as_json: bool, retry: bool, reason: str | None) -> None:
    """List objects that could not be indexed, and messages that name no object."""
    settings = load(CommonSettings, state_dir=_state_dir(context))
    if retry:
        asyncio.run(_retry(settings, None if reason is None else ReasonCode(reason)))
        click.echo("asked for: the bridge has them tried again; what becomes of each: image-search events")
        return
    found = asyncio.run(_failures(settings))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    _print_failures(found)


async def _retry(settings: CommonSettings, reason: ReasonCode | None) -> None:
    from infra import jobs, metadata_store
    from infra.followed_buckets import followed_buckets

    metadata = await metadata_store.connect(settings)
    try:
        await metadata.check()
        places = tuple(JobPlace(bucket=bucket) for bucket in await followed_buckets(settings, metadata))
        await jobs.ask(metadata, JobKind.RETRY, RetryArguments(places=places, reason=reason))
    finally:
        await metadata.close()


async def _failures(settings: CommonSettings) -> dict[str, list[dict[str, Any]]]:
    from infra import kafka, metadata_store

    metadata = await metadata_store.connect(settings)
    broker = await kafka.connect(settings)
    try:
        objects = []
        after = None
        while page := await metadata.list_rows(states=[RowState.FAILED], after=after, limit=FAILED_ROWS_PAGE):
            objects += [
                {
                    "bucket": row.ref.bucket,
                    "key": row.ref.key,
                    "reason": row.reason,
                    "message": row.message,
                    "attempt": row.attempt,
                }
                for row in page
            ]
            after = page[-1].ref
        return {"objects": objects, "messages": await _messages_without_object(broker)}
    finally:
        await broker.close()
        await metadata.close()


async def _messages_without_object(broker: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Dead letters of messages that could not be parsed, each identity once."""
    offsets = await broker.offsets(DEAD_LETTERS)
    left = {partition: end for partition, (begin, end) in offsets.items() if end > begin}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    if not left:
        return []
    async with broker.read(DEAD_LETTERS, {partition: begin for partition, (begin, _) in offsets.items()}) as pages:
        async for page in pages:
            for record in page:
                headers = record.headers
                if headers.get(HEADER_REASON, "").startswith("EVENT_"):
                    identity = tuple(headers.get(name, "") for name in (HEADER_TOPIC, HEADER_PARTITION, HEADER_OFFSET))
                    found[identity] = {
                        "topic": identity[0],
                        "partition": int(identity[1]),
                        "offset": int(identity[2]),
                        "reason": headers[HEADER_REASON],
                        "message": headers.get(HEADER_ERROR, ""),
                        "value": record.value[:200].decode("utf-8", "replace"),
                    }
                if record.offset + 1 >= left.get(record.partition, 0):
                    left.pop(record.partition, None)
            if not left:
                break
    return list(found.values())


def _print_failures(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, columns, rows in (
        ("Objects that could not be indexed", ("bucket", "key", "reason", "message", "attempt"), found["objects"]),
        ("Messages that are no events", ("topic", "partition", "offset", "reason", "message"), found["messages"]),
    ):
        if not rows:
            console.print(f"{title}: none")
            continue
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*(str(row[column]) for column in columns))
        console.print(table)


def _state_dir(context: click.Context) -> Path:
    state_dir = context.find_object(Path)
    if state_dir is None:
        raise ConfigurationError("run this as a command of image-search")
    return state_dir


commands: list[click.Command] = [worker, failures, evaluate, fit_projection, finetune, models]
