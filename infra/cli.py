"""The `image-search` command. Each service brings its commands by entry point; this module imports none of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from infra.errors import ConfigurationError, ImageSearchError
from infra.settings import DEFAULT_STATE_DIR, CommonSettings, ProcessorSettings, load

if TYPE_CHECKING:
    from infra.local_stack.folder import StackFolder

COMMANDS = "image_search.commands"
UPGRADE_STEPS = "image_search.upgrade_steps"
PROFILES = ("embedded", "full")

EXIT_FAILED = 1
EXIT_CONFIGURATION = 2


class _Group(click.Group):
    """Turns our errors into one message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        try:
            return super().invoke(ctx)
        except ImageSearchError as error:
            click.echo(f"image-search: {error}", err=True)
            ctx.exit(EXIT_CONFIGURATION if isinstance(error, ConfigurationError) else EXIT_FAILED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="image-search")
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_STATE_DIR,
    envvar="IMAGE_SEARCH_STATE_DIR",
    show_default=True,
    help="Folder of the local stack: data, logs, passwords, and stack.env, from which all commands read their settings.",
)
@click.pass_context
def cli(ctx: click.Context, state_dir: Path) -> None:
    """Drop pictures into a bucket, subscribe to what happens to them, search by picture."""
    ctx.obj = state_dir


_profile_option = click.option(
    "--profile", type=click.Choice(PROFILES), default=None, help="Which servers. Default: the last one, or embedded."
)


@cli.command()
@_profile_option
@click.option("--detach", is_flag=True, help="Return when everything is ready; end it with `down`.")
@click.option("--samples", is_flag=True, help="Put the sample pictures into the bucket when it is empty.")
@click.option("--workers", type=click.IntRange(1, 32), help="Worker processes that share the work. Default: as before, or 1.")
@click.option("--servers-only", is_flag=True, help="Servers and upgrade, none of the services: to restore a backup.")
@click.option("--ready-fd", type=int, hidden=True, help="Descriptor that is told when everything is ready.")
@click.pass_context
def up(
    ctx: click.Context,
    *,
    profile: str | None,
    detach: bool,
    samples: bool,
    workers: int | None,
    servers_only: bool,
    ready_fd: int | None,
) -> None:
    """Start servers and services on this machine, and stay until Ctrl-C."""
    from infra.local_stack import foreground

    folder = _folder(ctx, profile)
    if detach:
        foreground.detach(folder, samples=samples, workers=workers, servers_only=servers_only)
    else:
        foreground.stay(folder, samples=samples, workers=workers, servers_only=servers_only, ready_fd=ready_fd)


@cli.command()
@_profile_option
@click.option("--wipe", is_flag=True, help="Then remove the profile's data: pictures, vectors, rows, events, logs, passwords.")
@click.pass_context
def down(ctx: click.Context, *, profile: str | None, wipe: bool) -> None:
    """End the stack that runs in the state folder."""
    from infra.local_stack import control

    folder = _folder(ctx, profile)
    click.echo(control.end(folder))
    if wipe:
        for line in control.wipe(folder):
            click.echo(line)


@cli.command()
@_profile_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def status(ctx: click.Context, *, profile: str | None, as_json: bool) -> None:
    """Show processes, their health, and what the query service says. Exit status 1 unless all is well."""
    from infra.local_stack import control

    report = asyncio.run(control.status(_folder(ctx, profile)))
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        control.print_status(report)
    if not report.well:
        ctx.exit(EXIT_FAILED)


@cli.command()
@click.pass_context
def upgrade(ctx: click.Context) -> None:
    """Bring schema, bucket, topics, model and collection to what this version needs. Safe to repeat; services never do it."""
    from infra.telemetry import configure_logging

    settings = load(ProcessorSettings, state_dir=ctx.obj)
    configure_logging(settings, "upgrade")
    asyncio.run(_upgrade(settings))


async def _upgrade(settings: ProcessorSettings) -> None:
    from infra.metadata_store import upgrade_schema

    click.echo(await upgrade_schema(settings))
    for entry in sorted(entry_points(group=UPGRADE_STEPS), key=lambda entry: entry.name):
        step = entry.load()
        await step(settings, click.echo)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def verify(ctx: click.Context, *, as_json: bool) -> None:
    """Compare bucket, rows and vectors, and change nothing. Exit status 1 if they disagree."""
    from infra.verify import verify as compare

    report = asyncio.run(compare(_settings(ctx, "verify")))
    if as_json:
        click.echo(report.to_json())
    else:
        click.echo(f"{report.objects} objects; rows: {_counts(report.rows)}; vectors: {_counts(report.vectors)}")
        for kind, findings in report.findings.items():
            click.echo(f"{kind}: {findings.total}")
            for finding in findings.listed:
                click.echo(f"  {finding.bucket}/{finding.key}: {finding.detail}")
    if not report.clean:
        ctx.exit(EXIT_FAILED)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.pass_context
def backup(ctx: click.Context, folder: Path) -> None:
    """Copy rows and vectors into FOLDER, which must be new. Services may run meanwhile. Pictures are not in it."""
    from rich.console import Console

    from infra.backup import take_backup
    from infra.backup.display import CopyDisplay

    with CopyDisplay(Console(stderr=True)) as display:
        manifest = asyncio.run(take_backup(_settings(ctx, "backup"), folder, display))
    rows = {name: part.rows for name, part in manifest.tables.items() if part.rows}
    vectors = {part.model: part.vectors for part in manifest.collections.values()}
    click.echo(f"{folder}: rows: {_counts(rows)}; vectors: {_counts(vectors)}")


@cli.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--continue", "go_on", is_flag=True, help="Go on with a restore that was interrupted: what is there stays.")
@click.pass_context
def restore(ctx: click.Context, folder: Path, *, go_on: bool) -> None:
    """Copy rows and vectors from a backup in FOLDER into empty stores that `upgrade` has made. Services must be stopped."""
    from rich.console import Console

    from infra.backup import restore_backup
    from infra.backup.display import CopyDisplay

    with CopyDisplay(Console(stderr=True)) as display:
        done = asyncio.run(restore_backup(_settings(ctx, "restore"), folder, display, go_on=go_on))
    click.echo(f"{done.rows} rows and {done.vectors} vectors restored, {done.passed_over} vectors passed over")
    click.echo("next: start the services, then `image-search rebuild` for what changed since, and `image-search verify`")


def _settings(ctx: click.Context, name: str) -> CommonSettings:
    from infra.telemetry import configure_logging

    settings = load(CommonSettings, state_dir=ctx.obj)
    configure_logging(settings, name)
    return settings


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in numbers.items()) or "none"


def _folder(ctx: click.Context, profile: str | None) -> StackFolder:
    from infra.local_stack.folder import StackFolder, running_profile

    return StackFolder(ctx.obj, profile or running_profile(ctx.obj) or PROFILES[0])


def add_service_commands() -> None:
    """Load what the services bring. One that cannot be loaded is named on standard error; the others still work."""
    for entry in entry_points(group=COMMANDS):
        try:
            commands = entry.load()
        except ImportError as error:
            click.echo(f"image-search: the commands of {entry.name} could not be loaded: {error}", err=True)
            continue
        for command in commands:
            cli.add_command(command)


def main() -> None:
    add_service_commands()
    cli(prog_name="image-search")


if __name__ == "__main__":
    main()
