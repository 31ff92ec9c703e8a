"""`image-search tune-index`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infra.errors import ConfigurationError
from infra.settings import DEFAULT_STATE_DIR, CommonSettings, load

if TYPE_CHECKING:
    from infra.progress import Progress
    from query_service.index_tuning.trials import Tuning


@click.command("tune-index")
@click.option(
    "--sample", type=click.IntRange(1024, 200_000), default=20_000, show_default=True, help="Most vectors that are copied."
)
@click.option("--queries", type=click.IntRange(10, 2000), default=200, show_default=True, help="Searches of each trial.")
@click.option(
    "--recall", "goal", type=click.FloatRange(0, 1), default=0.99, show_default=True, help="Recall@10 that has to be reached."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of the table.")
@click.option("--clean", is_flag=True, help="Only remove what a killed run left behind.")
@click.pass_context
def tune_index(context: click.Context, *, sample: int, queries: int, goal: float, as_json: bool, clean: bool) -> None:
    """Measure indexes of Milvus on a copy of one's own vectors, and recommend one.

    The collection is only read. The copy is removed at the end, also on Ctrl-C.
    """
    from rich.console import Console

    from infra.progress import shown_on
    from query_service.index_tuning.display import document, show

    settings = load(CommonSettings, state_dir=context.find_object(Path) or DEFAULT_STATE_DIR)
    console, aside = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))
    if clean:
        from infra.vector_store.tuning import remove_left_over

        names = asyncio.run(remove_left_over(settings))
        aside.print(f"removed: {', '.join(names)}" if names else "nothing was left behind")
        return
    with shown_on(aside) as progress:
        tuning = asyncio.run(_tune(settings, sample, queries, goal, progress))
    if as_json:
        click.echo(json.dumps(document(tuning), indent=2))
    else:
        show(tuning, console)


async def _tune(settings: CommonSettings, rows: int, queries: int, goal: float, progress: Progress) -> Tuning:
    from infra import metadata_store, vector_store
    from query_service.index_tuning.trials import tune
    from schemas.tables import ModelState

    metadata, vectors = await metadata_store.connect(settings), await vector_store.connect(settings)
    try:
        active = await metadata.models([ModelState.ACTIVE])
        if not active:
            raise ConfigurationError("no model has been set up yet. Run: image-search upgrade")
        return await tune(settings, vectors, active[0].collection, rows=rows, queries=queries, goal=goal, progress=progress)
    finally:
        await vectors.close()
        await metadata.close()
