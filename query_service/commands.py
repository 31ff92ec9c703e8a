"""`image-search serve`, `search`, `events`, `keys` and `tune-index`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from infra.errors import ConfigurationError
from infra.settings import ClientSettings, CommonSettings, QuerySettings, load
from query_service.index_tuning.commands import tune_index
from schemas.access import Scope

if TYPE_CHECKING:
    from infra.metadata_store.interface import ApiKey, MetadataStore
    from query_service.client import QueryClient
    from query_service.sse import Message
    from schemas.api import SearchAnswer

Answer = TypeVar("Answer")

LONGEST_KEY_NAME = 128
# Of an enum itself click would take the names, not the values.
SCOPES = [scope.value for scope in Scope]
_DAY_US = 24 * 3600 * 1_000_000


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
    options = {"limit": limit, "min_score": min_score, "bucket": bucket, "prefix": prefix, "filter": conditions}
    parameters = {name: str(value) for name, value in options.items() if value is not None}

    async def ask() -> SearchAnswer:
        picture = await asyncio.to_thread(file.read_bytes)
        async with _client(context) as client:
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
    start = cursor or (None if follow else "earliest")
    options = {"cursor": start, "type": types, "bucket": bucket, "prefix": prefix}
    parameters = {name: value for name, value in options.items() if value is not None}

    async def read() -> None:
        async with _client(context) as client:
            messages: AsyncIterator[Message] = client.follow(parameters) if follow else client.replay(parameters)
            async for message in messages:
                click.echo(_json_line(message) if as_json else _line(message))

    try:
        asyncio.run(read())
    except KeyboardInterrupt:
        # How one leaves --follow: no error.
        return


@click.group()
def keys() -> None:
    """Make, list and revoke keys of the HTTP API. Works on the database, so it makes the first key, too."""


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What it may do; repeatable.",
)
@click.option(
    "--place", "places", multiple=True, metavar="BUCKET[/PREFIX]", help="Only there; repeatable. Default: everywhere."
)
@click.option("--expires-days", type=click.IntRange(1, 3650), help="Days until it expires. Default: it does not.")
@click.pass_context
def create(
    context: click.Context, *, name: str, scopes: tuple[str, ...], places: tuple[str, ...], expires_days: int | None
) -> None:
    """Make a key and print it, alone, on standard output. It is shown once and cannot be had again."""
    from infra.metadata_store.engine import now_us
    from query_service.api_keys import new_key
    from schemas.access import Grant, place_from_text

    if not name.strip() or len(name) > LONGEST_KEY_NAME:
        raise ConfigurationError(f"a key's name has 1 to {LONGEST_KEY_NAME} characters")
    try:
        grant = Grant.of(map(Scope, scopes), map(place_from_text, places))
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    expires_at_us = None if expires_days is None else now_us() + expires_days * _DAY_US
    made = new_key(name, grant, expires_at_us=expires_at_us)
    _on_metadata(context, lambda store: store.add_api_key(made.stored))
    click.echo(f"Key {made.stored.key_id} ({name}). Keep it now: it is not shown again.", err=True)
    click.echo(made.text)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def list_keys(context: click.Context, *, as_json: bool) -> None:
    """Show all keys, revoked ones too, by what may be shown of them."""
    found = _on_metadata(context, lambda store: store.api_keys())
    if as_json:
        click.echo(json.dumps([_shown(key) for key in found], indent=2, ensure_ascii=False))
    else:
        _print_keys(found)


@keys.command()
@click.argument("key_id")
@click.pass_context
def revoke(context: click.Context, *, key_id: str) -> None:
    """Refuse the key with this id from now on: within seconds, everywhere, for good."""
    if not _on_metadata(context, lambda store: store.revoke_api_key(key_id)):
        raise ConfigurationError("there is no key with this id; `image-search keys list` shows them")
    click.echo(f"Key {key_id} is revoked.")


def _on_metadata(context: click.Context, ask: Callable[[MetadataStore], Awaitable[Answer]]) -> Answer:
    from infra import metadata_store

    settings = load(CommonSettings, state_dir=_state_dir(context))

    async def work() -> Answer:
        store = await metadata_store.connect(settings)
        try:
            return await ask(store)
        finally:
            await store.close()

    return asyncio.run(work())


def _shown(key: ApiKey) -> dict[str, Any]:
    from infra.metadata_store.engine import now_us
    from schemas.access import place_text
    from schemas.api import time_of_us

    def moment(time_us: int | None) -> str | None:
        return None if time_us is None else time_of_us(time_us).isoformat(timespec="seconds")

    state = "good" if key.is_good_at(now_us()) else "expired" if key.revoked_at_us is None else "revoked"
    return {
        "id": key.key_id,
        "name": key.name,
        "state": state,
        "scopes": sorted(key.grant.scopes),
        "places": [place_text(place) for place in key.grant.places],
        "created_at": moment(key.created_at_us),
        "expires_at": moment(key.expires_at_us),
        "last_used_at": moment(key.last_used_at_us),
    }


def _print_keys(found: list[ApiKey]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "name", "state", "scopes", "places", "expires", "last used")
    # The id is what one copies from here: what is narrow is the rest.
    table.columns[0].min_width = 12
    for shown in map(_shown, found):
        places = "\n".join(shown["places"]) or "everywhere"
        used, expires = shown["last_used_at"] or "never", shown["expires_at"] or "never"
        cells = (shown["id"], shown["name"], shown["state"], ", ".join(shown["scopes"]), places, expires, used)
        table.add_row(*map(escape, cells))
    Console().print(table if found else "No keys. `image-search keys create NAME --scope admin` makes one.")


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


def _client(context: click.Context) -> QueryClient:
    from query_service.client import QueryClient

    settings = load(ClientSettings, state_dir=_state_dir(context))
    return QueryClient(settings.query_url, settings.api_key.get_secret_value())


def _state_dir(context: click.Context) -> Path:
    state_dir = context.find_object(Path)
    if state_dir is None:
        raise ConfigurationError("run this as a command of image-search")
    return state_dir


commands: list[click.Command] = [serve, search, events, keys, tune_index]
