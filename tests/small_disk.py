"""A disk that a test can fill up: a small file system in memory."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import unavailable

CHUNK = b"\0" * 4096


@dataclass(frozen=True, slots=True)
class SmallDisk:
    root: Path

    @property
    def _filler(self) -> Path:
        return self.root / "filler"

    def fill(self) -> None:
        """Until not one byte more fits."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while True:
                os.write(descriptor, CHUNK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(descriptor)

    def make_room(self) -> None:
        self._filler.unlink()

    @property
    def is_full(self) -> bool:
        return os.statvfs(self.root).f_bavail == 0


@contextmanager
def small_disk(root: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """Mounted at `root` for the length of the block."""
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "tmpfs", str(root)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unavailable(f"a disk that may be filled up takes the right to mount one: {done.stderr.strip()}")
    try:
        yield SmallDisk(root)
    finally:
        # Lazily: whatever still has a file open there must not keep a test run from ending.
        subprocess.run(["umount", "--lazy", str(root)], check=True)
