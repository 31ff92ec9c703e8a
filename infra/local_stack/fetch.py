"""`python -m infra.local_stack.fetch`: build and install now what the full profile's servers need beyond wheels.

A first start does the same; what must not wait for it, such as the tests, does it before.
"""

from __future__ import annotations

import asyncio
import sys

from rich.console import Console

from infra.errors import ImageSearchError
from infra.local_stack import mariadb, minio
from infra.local_stack.reporter import Reporter
from infra.settings import DEFAULT_STATE_DIR, StackSettings, load


def main() -> int:
    with Reporter(Console(highlight=False, soft_wrap=True)) as reporter:
        try:
            asyncio.run(_fetch(load(StackSettings, state_dir=DEFAULT_STATE_DIR), reporter))
        except ImageSearchError as error:
            reporter.warn(str(error))
            return 1
    return 0


async def _fetch(settings: StackSettings, reporter: Reporter) -> None:
    await asyncio.to_thread(settings.cache_dir.mkdir, parents=True, exist_ok=True)
    found = await mariadb.programs(settings.cache_dir, reporter.doing)
    reporter.done(f"MariaDB: {found.server}")
    path = await minio.program_path(settings.cache_dir, settings.cache_dir, reporter.doing)
    reporter.done(f"MinIO: {path}")


if __name__ == "__main__":
    sys.exit(main())
