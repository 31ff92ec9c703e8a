"""`image-search serve`, `search`, `events` and `tune-index`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infra.errors import ConfigurationError
from infra.settings import ClientSettings, QuerySettings, load
from query_service.index_tuning.commands import tune_index

if TYPE_CHECKING:
    from query_service.sse import Message
    from schemas.api import SearchAnswer


@click.command()
@click.pass_context
def serve(context: click.Context) -> None:
    """Run the query service: search, events and the page over HTTP."""
    from infra.telemetry import configure_logging
    from infra.tracing import traces
    from query_service.server import run

    settings = load(QuerySettings, state_dir=_state_dir(context))
    configure_logging(settings, "query_service")
    with traces(settings, "query_service"):
        asyncio.run(run(settings))


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most hits.")
@click.option("--min-score", type=click.FloatRange(-100, 100), help="Only hits that score this or more.")
@click.option("--bucket", help="Only this bucket.")
@click.option("--prefix", help="Only keys that start with this.")
@click.option("--filter", "conditions", metavar="JSON", help="Only what this filter matches; see docs/api.md.")
@click.option("--json", "as_json", is_flag=True, help="Print the service's answer as JSON.")
@click.pass_context
def search(
    context: click.Context,
    *,
    file: Path,
    limit: int,
    min_score: float | None,
    bucket: str | None,
    prefix: str | None,
    conditions: str | None,
    as_json: bool,
) -> None:
    """Search by the picture in FILE."""
    from query_service.client import QueryClient

    options = {"limit": limit, "min_score": min_score, "bucket": bucket, "prefix": prefix, "filter": conditions}
    parameters = {name: str(value) for name, value in options.items() if value is not None}

    async def ask() -> SearchAnswer:
        picture = await asyncio.to_thread(file.read_bytes)
        async with QueryClient(_url(context)) as client:
            return await client.search(picture, parameters)

    answer = asyncio.run(ask())
    if as_json:
        click.echo(answer.model_dump_json(indent=2))
    else:
        _print_hits(answer)


@click.command()
@click.option("--follow", is_flag=True, help="Stay and print what happens; else replay what is there and stop.")
@click.option("--cursor", help="Behind this id of an earlier event. Default: with --follow now, else the oldest that is kept.")
@click.option("--type", "types", help="Only these, comma-separated: indexed, updated, deleted, failed, ignored, duplicate.")
@click.option("--bucket", help="Only this bucket.")
@click.option("--prefix", help="Only keys that start with this.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line: the event and its cursor.")
@click.pass_context
def events(
    context: click.Context,
    *,
    follow: bool,
    cursor: str | None,
    types: str | None,
    bucket: str | None,
    prefix: str | None,
    as_json: bool,
) -> None:
    """Print what became of pictures."""
    from query_service.client import QueryClient

    start = cursor or (None if follow else "earliest")
    options = {"cursor": start, "type": types, "bucket": bucket, "prefix": prefix}
    parameters = {name: value for name, value in options.items() if value is not None}

    async def read() -> None:
        async with QueryClient(_url(context)) as client:
            messages: AsyncIterator[Message] = client.follow(parameters) if follow else client.replay(parameters)
            async for message in messages:
                click.echo(_json_line(message) if as_json else _line(message))

    try:
        asyncio.run(read())
    except KeyboardInterrupt:
        # How one leaves --follow: no error.
        return


def _print_hits(answer: SearchAnswer) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("#", "score", "distance", "bucket", "key", "size", "pixels")
    for column in (0, 1, 2, 5, 6):
        table.columns[column].justify = "right"
    # A key is what one copies from here: fold it rather than cut it.
    table.columns[4].overflow = "fold"
    for number, hit in enumerate(answer.hits, 1):
        table.add_row(
            str(number),
            f"{hit.score:.2f}",
            f"{hit.distance:.4f}",
            hit.bucket,
            hit.key,
            "" if hit.size is None else f"{hit.size:,}",
            "" if hit.width is None else f"{hit.width}×{hit.height}",
        )
    console = Console()
    console.print(table if answer.hits else "No hits.")
    age = "not known" if answer.lag_ms is None else f"{answer.lag_ms / 1000:.1f} s ago"
    spent = ", ".join(f"{name} {value:.1f} ms" for name, value in answer.timing_ms.model_dump(exclude_none=True).items())
    console.print(f"model {answer.model}; indexed through {age}; {spent}", style="dim", highlight=False)


def _line(message: Message) -> str:
    # Not through our model of it: a newer service may publish types that this version does not know.
    event = json.loads(message.data)
    data = event["data"]
    what = event["type"].rpartition(".")[2]
    why = f"  {data['reason']}: {data.get('message', '')}" if data.get("reason") else ""
    return f"{event['time']}  {what:<9}  {data['bucket']}/{data['key']}{why}"


def _json_line(message: Message) -> str:
    return json.dumps({"cursor": message.last_id, "event": json.loads(message.data)}, ensure_ascii=False)


def _url(context: click.Context) -> str:
    return load(ClientSettings, state_dir=_state_dir(context)).query_url


def _state_dir(context: click.Context) -> Path:
    state_dir = context.find_object(Path)
    if state_dir is None:
        raise ConfigurationError("run this as a command of image-search")
    return state_dir


commands: list[click.Command] = [serve, search, events, tune_index]
