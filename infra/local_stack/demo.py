"""`python -m infra.local_stack.demo`: the whole way in one go, on a stack of its own that is gone afterwards.

Starts servers and services on free ports in a temporary folder, puts the samples, and searches with an edited copy of one.
Exit status 0 only if the right picture came first.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image
from rich.console import Console
from rich.table import Table

from infra.cli import EXIT_CONFIGURATION, PROFILES
from infra.errors import ImageSearchError
from infra.local_stack import ports, sample_pictures, stack
from infra.local_stack.folder import StackFolder
from infra.local_stack.reporter import Reporter
from infra.local_stack.supervisor import ProgramFailed
from infra.settings import StackSettings

ORIGINAL = "mountain-path.jpg"
EDITS = "cropped to the middle 80 %, scaled to 60 %, encoded anew as JPEG of quality 50"
INDEXED_SECONDS = 120.0
ASK_SECONDS = 0.25
HITS = 5


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    profile = os.environ.get("PROFILE", PROFILES[0])
    if profile not in PROFILES:
        console.print(f"there is no profile {profile!r}; choose {' or '.join(PROFILES)}", style="red", markup=False)
        return EXIT_CONFIGURATION
    with tempfile.TemporaryDirectory(prefix="image-search-demo-") as state_dir, Reporter(console) as reporter:
        try:
            return asyncio.run(_demo(StackFolder(Path(state_dir), profile), reporter))
        except ImageSearchError as error:
            reporter.warn(str(error))
            return 1


async def _demo(folder: StackFolder, reporter: Reporter) -> int:
    names = list(StackSettings().ports())
    settings = StackSettings.model_validate(dict(zip(names, ports.find_free(len(names)), strict=True)))
    async with (
        stack.running(folder, settings, reporter, samples=True) as running,
        aiohttp.ClientSession(running.query_url, timeout=aiohttp.ClientTimeout(total=30)) as session,
    ):
        began = time.monotonic()
        wanted = len(sample_pictures.paths())
        reporter.doing(f"waiting until {wanted} pictures can be found")
        await _until_indexed(session, wanted)
        reporter.done(f"{wanted} pictures can be found, {time.monotonic() - began:.1f} s after the last was put")
        copy = edited((sample_pictures.FOLDER / ORIGINAL).read_bytes())
        async with session.post(
            "/v1/search", params={"limit": HITS}, data=copy, headers={"Content-Type": "image/jpeg"}, raise_for_status=True
        ) as answer:
            hits = (await answer.json())["hits"]
    expected = sample_pictures.key_of(Path(ORIGINAL))
    reporter.console.print(f"\nSearched with {ORIGINAL}, {EDITS}:")
    reporter.console.print(_table(hits, expected))
    found = bool(hits) and hits[0]["key"] == expected
    reporter.console.print("The right picture came first." if found else "The right picture did NOT come first.")
    return 0 if found else 1


def edited(picture: bytes) -> bytes:
    """What people do to pictures before they pass them on (see EDITS)."""
    with Image.open(io.BytesIO(picture)) as original:
        width, height = original.size
        middle = original.crop((width // 10, height // 10, width - width // 10, height - height // 10))
        small = middle.resize((middle.width * 6 // 10, middle.height * 6 // 10), Image.Resampling.BICUBIC)
    output = io.BytesIO()
    small.convert("RGB").save(output, "JPEG", quality=50)
    return output.getvalue()


async def _until_indexed(session: aiohttp.ClientSession, wanted: int) -> None:
    try:
        async with asyncio.timeout(INDEXED_SECONDS):
            while True:
                async with session.get("/v1/status", raise_for_status=True) as answer:
                    images = (await answer.json())["images"]
                if images["failed"]:
                    raise ProgramFailed(f"{images['failed']} of the sample pictures could not be indexed")
                if images["indexed"] >= wanted:
                    return
                await asyncio.sleep(ASK_SECONDS)
    except TimeoutError:
        raise ProgramFailed(f"after {INDEXED_SECONDS:.0f} s fewer than {wanted} pictures are indexed") from None


def _table(hits: list[dict[str, Any]], expected: str) -> Table:
    table = Table("", "key", "score", "distance", "size")
    for place, hit in enumerate(hits, 1):
        table.add_row(
            str(place),
            hit["key"],
            f"{hit['score']:.2f}",
            f"{hit['distance']:.4f}",
            f"{hit['width']}x{hit['height']}",
            style="bold green" if hit["key"] == expected else "",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
