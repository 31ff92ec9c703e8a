"""`image-search bridge`, `scan`, `rebuild`, `put`, `provision` and `buckets`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infra.errors import ConfigurationError
from infra.settings import BridgeSettings, CommonSettings, load

if TYPE_CHECKING:
    from infra.metadata_store.interface import Job, MetadataStore
    from ingest_bridge.upload import LocalFile, UploadResult
    from schemas.jobs import ScanArguments

FOLLOW_SECONDS = 0.5
NOBODY_SECONDS = 10.0


@click.command()
@click.pass_context
def bridge(context: click.Context) -> None:
    """Run the bridge: follows the buckets and tells the workers what may have changed."""
    from infra.telemetry import configure_logging
    from infra.tracing import traces
    from ingest_bridge.service import run

    settings = load(BridgeSettings, state_dir=_state_dir(context))
    configure_logging(settings, "bridge")
    with traces(settings, "bridge"):
        asyncio.run(run(settings))


# -- scan ----------------------------------------------------------------------------------------------------------------
@click.command()
@click.option("--bucket", help="Which bucket. Without it: the first one that is followed.")
@click.option("--prefix", default="", help="Only keys that begin with this.")
@click.option("--allow-removal", is_flag=True, help="Remove however many objects are gone from the bucket.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end, and no progress.")
@click.pass_context
def scan(context: click.Context, bucket: str | None, prefix: str, allow_removal: bool, as_json: bool) -> None:
    """Compare a bucket with what is indexed, and have the workers mend what differs.

    The running bridge does the work; it goes on when this command is interrupted.
    """
    from ingest_bridge.scan_display import result_lines
    from schemas.jobs import ScanArguments
    from schemas.tables import JobState

    settings = load(CommonSettings, state_dir=_state_dir(context))
    arguments = ScanArguments(bucket=asyncio.run(_followed(settings, bucket))[0], prefix=prefix, allow_removal=allow_removal)
    job = asyncio.run(_scan(settings, arguments, quiet=as_json))
    if as_json:
        click.echo(json.dumps(_job_document(job), ensure_ascii=False, indent=2))
    else:
        click.echo(result_lines(job))
    sys.exit(0 if job.state is JobState.DONE else 1)


# -- rebuild -------------------------------------------------------------------------------------------------------------
@click.command()
@click.option("--bucket", help="Which bucket. Without it: all that are followed.")
@click.option("--prefix", default="", help="Only keys that begin with this.")
@click.option("--allow-removal", is_flag=True, help="Remove however many objects are gone from the bucket.")
@click.pass_context
def rebuild(context: click.Context, bucket: str | None, prefix: str, allow_removal: bool) -> None:
    """Make the index equal to the bucket after a store was lost, and return when it is.

    Lost rows are written anew, with the vectors that are still there; lost vectors are embedded anew. It is a scan that
    waits for the workers: `image-search up`, or `upgrade`, comes first.
    """
    from schemas.jobs import ScanArguments

    settings = load(CommonSettings, state_dir=_state_dir(context))
    scans = [
        ScanArguments(bucket=name, prefix=prefix, allow_removal=allow_removal)
        for name in asyncio.run(_followed(settings, bucket))
    ]
    sys.exit(0 if asyncio.run(_rebuild(settings, scans)) else 1)


async def _rebuild(settings: CommonSettings, scans: Sequence[ScanArguments]) -> bool:
    from rich.console import Console

    from infra import kafka
    from ingest_bridge.rebuild import until_worked_off
    from ingest_bridge.scan_display import result_lines
    from schemas.tables import JobState

    console = Console(highlight=False)
    for arguments in scans:
        job = await _scan(settings, arguments, quiet=False, anew=True)
        console.print(f"{arguments.bucket}: {result_lines(job)}", markup=False)
        if job.state is not JobState.DONE:
            return False
    broker = await kafka.connect(settings)
    try:
        with console.status("waiting for the workers") as status:
            await until_worked_off(broker, lambda left: status.update(f"the workers have {left} events left"))
    finally:
        await broker.close()
    console.print("The workers have done all of it. To look at it from outside: image-search verify")
    return True


async def _followed(settings: CommonSettings, bucket: str | None = None) -> tuple[str, ...]:
    """This bucket, or all. Raises ConfigurationError for one that is not followed."""
    from infra import metadata_store
    from infra.followed_buckets import followed_buckets

    metadata = await metadata_store.connect(settings)
    try:
        followed = await followed_buckets(settings, metadata)
    finally:
        await metadata.close()
    if bucket is not None and bucket not in followed:
        raise ConfigurationError(f"the bucket {bucket!r} is not followed: image-search buckets add {bucket}")
    return followed if bucket is None else (bucket,)


# -- both ----------------------------------------------------------------------------------------------------------------
async def _scan(settings: CommonSettings, arguments: ScanArguments, *, quiet: bool, anew: bool = False) -> Job:
    """The job as it stands in the end: done, failed, stopped, or still queued because no bridge runs.

    One that is asked for already is followed; with `anew` only if it is still to begin.
    """
    from rich.console import Console

    from infra import metadata_store
    from infra.jobs import ask
    from ingest_bridge.scan_display import ScanDisplay
    from schemas.tables import JobKind

    metadata = await metadata_store.connect(settings)
    try:
        await metadata.check()
        job = await ask(metadata, JobKind.SCAN, arguments, anew=anew)
        with ScanDisplay(Console(quiet=quiet)) as display:
            return await _follow(metadata, job, display.show)
    finally:
        await metadata.close()


async def _follow(metadata: MetadataStore, job: Job, show: Callable[[Job], None]) -> Job:
    """Until it has ended, or nobody has taken it up although nobody is busy."""
    from infra.retry import until_done
    from schemas.tables import JobState

    patient_until = time.monotonic() + NOBODY_SECONDS
    while True:
        found = await until_done(partial(metadata.job, job.job_id))
        job = found if found is not None else job
        show(job)
        if job.state not in (JobState.QUEUED, JobState.RUNNING):
            return job
        unfinished = await until_done(partial(metadata.unfinished_jobs, job.kind))
        if any(one.state is JobState.RUNNING and one.lease_until_us > time.time_ns() // 1000 for one in unfinished):
            patient_until = time.monotonic() + NOBODY_SECONDS
        elif time.monotonic() > patient_until:
            return job
        await asyncio.sleep(FOLLOW_SECONDS)


def _job_document(job: Job) -> dict[str, object]:
    return {"job_id": job.job_id, "state": job.state, "message": job.message, **job.arguments, **job.progress}


# -- put -----------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--bucket", help="Into which bucket. Without it: the first one that is followed.")
@click.option("--prefix", default="", help="Put before each key, such as holiday/.")
@click.pass_context
def put(context: click.Context, paths: tuple[Path, ...], bucket: str | None, prefix: str) -> None:
    """Put files, and all files of folders, into a bucket.

    The key of a file is its name, or its path relative to the folder that was named.
    """
    from ingest_bridge.upload import find_files

    settings = load(CommonSettings, state_dir=_state_dir(context))
    files = list(find_files(paths, prefix))
    failed = asyncio.run(_put(settings, bucket or settings.buckets[0], files))
    click.echo(f"{len(files) - failed} of {len(files)} files put")
    sys.exit(1 if failed else 0)


async def _put(settings: CommonSettings, bucket: str, files: Sequence[LocalFile]) -> int:
    """How many failed."""
    from rich.console import Console
    from rich.progress import Progress

    from infra import object_store
    from ingest_bridge.upload import upload

    console = Console()
    failed = 0
    objects = await object_store.connect(settings)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("putting", total=len(files))

            def tell(result: UploadResult) -> None:
                nonlocal failed
                failed += result.error is not None
                bar.advance(task)
                console.print(_result_line(result), highlight=False, markup=False, soft_wrap=True)

            await upload(objects, bucket, files, tell)
    finally:
        await objects.close()
    return failed


def _result_line(result: UploadResult) -> str:
    if result.error is not None:
        return f"FAILED  {result.file.path}: {result.error}"
    return f"put     {result.file.path} as {result.ref} ({result.size} bytes)"


def _state_dir(context: click.Context) -> Path:
    state_dir = context.find_object(Path)
    if state_dir is None:
        raise ConfigurationError("run this as a command of image-search")
    return state_dir


# -- provision -----------------------------------------------------------------------------------------------------------
@click.command()
@click.option("--dry-run", is_flag=True, help="Change nothing; show how notification rules would change.")
@click.pass_context
def provision(context: click.Context, dry_run: bool) -> None:
    """Make topics and buckets that are missing, and set the buckets' notification rules. Rules of others are kept."""
    from ingest_bridge import provision as steps

    settings = load(CommonSettings, state_dir=_state_dir(context))
    asyncio.run(steps.provision(settings, click.echo, dry_run=dry_run))


# -- buckets -------------------------------------------------------------------------------------------------------------
@click.group()
def buckets() -> None:
    """Show, add and take away buckets that are followed, while everything runs."""


@buckets.command("list")
@click.pass_context
def list_buckets(context: click.Context) -> None:
    """Print the buckets that are followed, a line each."""
    settings = load(CommonSettings, state_dir=_state_dir(context))
    for name in asyncio.run(_followed(settings)):
        click.echo(name)


@buckets.command()
@click.argument("name")
@click.pass_context
def add(context: click.Context, name: str) -> None:
    """Follow the bucket NAME from now on, and take in what it holds. Made if it is missing."""
    from ingest_bridge.provision import follow_bucket

    asyncio.run(follow_bucket(load(CommonSettings, state_dir=_state_dir(context)), name, click.echo))
    click.echo(f"{name} is followed within seconds, by every bridge, and then scanned: image-search scan --bucket {name}")


@buckets.command()
@click.argument("name")
@click.pass_context
def remove(context: click.Context, name: str) -> None:
    """Follow the bucket NAME no more. What is indexed of it stays as it is: empty the bucket first to have that removed."""
    from ingest_bridge.provision import unfollow_bucket

    asyncio.run(unfollow_bucket(load(CommonSettings, state_dir=_state_dir(context)), name, click.echo))
    click.echo(f"{name} is not followed any more; what was indexed of it can still be found, and stays as it was then")


commands: list[click.Command] = [bridge, scan, rebuild, put, provision, buckets]
