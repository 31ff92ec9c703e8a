"""`image-search up`: start, tell what to do next, stay until told to stop. `--detach` runs the same in the background."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from infra.local_stack import milvus, stack
from infra.local_stack.folder import StackFolder
from infra.local_stack.reporter import Reporter
from infra.local_stack.supervisor import ProgramFailed
from infra.settings import DEFAULT_STATE_DIR, StackSettings, load

READY = b"ready\n"
FOLLOW_SECONDS = 0.2


def stay(
    folder: StackFolder,
    *,
    samples: bool,
    workers: int | None = None,
    servers_only: bool = False,
    ready_fd: int | None = None,
) -> None:
    """Returns after Ctrl-C or SIGTERM, when everything that was started has ended. A second one kills instead of waiting.

    `workers`: how many; None: as the settings say. `servers_only`: the services are left out.

    Raises what `stack.running` raises.
    """
    settings = load(StackSettings, state_dir=folder.state_dir, **({} if workers is None else {"workers": workers}))
    console = Console(highlight=False, soft_wrap=True)
    with Reporter(console) as reporter:
        asyncio.run(_stay(folder, settings, reporter, samples=samples, servers_only=servers_only, ready_fd=ready_fd))


async def _stay(
    folder: StackFolder,
    settings: StackSettings,
    reporter: Reporter,
    *,
    samples: bool,
    servers_only: bool,
    ready_fd: int | None,
) -> None:
    hurry = asyncio.Event()
    staying = asyncio.current_task()
    assert staying is not None
    told = False

    def stop() -> None:
        nonlocal told
        if told:
            hurry.set()
            return
        told = True
        reporter.console.print("Stopping. Press Ctrl-C again to kill instead of waiting.")
        staying.cancel()

    # SIGHUP too: a terminal that is closed must not leave the stack behind.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    began = time.monotonic()
    try:
        async with stack.running(
            folder, settings, reporter, samples=samples, servers_only=servers_only, hurry=hurry
        ) as running:
            reporter.quiet()
            reporter.console.print(f"\nReady after {time.monotonic() - began:.1f} s.\n")
            guide = (
                f"  The servers run, without the services.\n\n  {milvus.ADDRESS_NOTICE}\n" if servers_only else _guide(running)
            )
            reporter.console.print(guide, markup=False)
            if ready_fd is not None:
                os.write(ready_fd, READY)
                os.close(ready_fd)
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not told:
            raise


def detach(folder: StackFolder, *, samples: bool, workers: int | None = None, servers_only: bool = False) -> None:
    """Start `image-search up` in a session of its own and return when it is ready. Raises ProgramFailed when it fails."""
    folder.make()
    log_path = folder.logs / "up.log"
    ready, tell = os.pipe()
    options = ["--profile", folder.profile, "--ready-fd", str(tell), *(["--samples"] if samples else [])]
    options += [] if workers is None else ["--workers", str(workers)]
    options += ["--servers-only"] if servers_only else []
    with log_path.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(  # noqa: S603 - this very program
            stack.command(folder, "up", *options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[tell],
        )
    os.close(tell)
    try:
        answer = _follow(log_path, began, ready)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        os.close(ready)
    if answer != READY:
        raise ProgramFailed(f"the stack did not start (exit status {process.wait()}); see above and {log_path}")
    sys.stdout.write("It runs in the background.\n")


def _follow(log_path: Path, position: int, ready: int) -> bytes:
    """Show what is added to a log until the descriptor has something to read, and return that; empty at its end."""
    with log_path.open(errors="replace") as log:
        log.seek(position)
        while True:
            readable = select.select([ready], [], [], FOLLOW_SECONDS)[0]
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if readable:
                answer = os.read(ready, len(READY))
                sys.stdout.write(log.read())
                return answer


def _guide(running: stack.Stack) -> str:
    folder, services = running.folder, running.services
    program = "image-search" if shutil.which("image-search") else _shown(Path(sys.executable).with_name("image-search"))
    if folder.state_dir != DEFAULT_STATE_DIR:
        program += f" --state-dir {folder.state_dir}"
    stack_file = _shown(folder.stack_file)
    bucket = services.buckets[0]
    trust = "AWS_CA_BUNDLE=$CA_FILE " if services.s3_ca_file else ""
    keys = {
        "off": "off: this machine only, since the API listens on loopback",
        "required": f"asked for; {program} keys create NAME --scope admin",
    }
    return f"""\
  page      {running.query_url}/
  API       {running.query_url}/v1/  described by {running.query_url}/openapi.json
  API keys  {keys.get(running.api_keys, "off")}
  S3        {services.s3_endpoint}  bucket {bucket}; S3_ACCESS_KEY and S3_SECRET_KEY are in {stack_file}
  data      {_shown(folder.root)}  logs in {_shown(folder.logs)}

  search    curl -sF file=@PICTURE.jpg '{running.query_url}/v1/search?limit=5'
  put       {program} put PICTURE.jpg
            or any S3 client:
            set -a; . {stack_file}; set +a
            {trust}AWS_ACCESS_KEY_ID=$S3_ACCESS_KEY AWS_SECRET_ACCESS_KEY=$S3_SECRET_KEY \\
              aws --endpoint-url $S3_ENDPOINT s3 cp PICTURE.jpg s3://{bucket}/
  events    {program} events --follow
            curl -N {running.query_url}/v1/events
  state     {program} status
  end       Ctrl-C, or {program} down

  {milvus.ADDRESS_NOTICE}
"""


def _shown(path: Path) -> str:
    """Relative to where the person is, when that is shorter to type."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
