"""Files of this machine into a bucket: what `image-search put` does."""

from __future__ import annotations

import asyncio
import mimetypes
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ImageSearchError
from infra.object_store.interface import ObjectStore
from schemas.identity import ObjectRef

UPLOADS_AT_ONCE = 8
MOST_BYTES = 64 * 1024 * 1024
"""A file is held in memory while it is sent. Nothing near this size is indexed (IMAGE_SEARCH_MAX_OBJECT_BYTES)."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file, and the key it gets."""

    path: Path
    key: str


@dataclass(frozen=True, slots=True)
class UploadResult:
    """What became of one file; `error` tells people why it was not put."""

    file: LocalFile
    ref: ObjectRef
    size: int = 0
    error: str | None = None


def find_files(paths: Iterable[Path], prefix: str = "") -> Iterator[LocalFile]:
    """Files as they are named, and all files below folders, in the order of their names. Links to folders are not followed.

    A file's key is its name, or its path relative to the folder that was named, behind `prefix`.
    """
    for path in paths:
        if path.is_dir():
            for file in _files_below(path):
                yield LocalFile(file, prefix + file.relative_to(path).as_posix())
        else:
            yield LocalFile(path, prefix + path.name)


def _files_below(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(directory) / name


async def upload(
    objects: ObjectStore, bucket: str, files: Iterable[LocalFile], on_result: Callable[[UploadResult], None]
) -> None:
    """Put all files, some at a time; each result is told as it comes. One file that fails does not stop the others."""
    waiting = iter(files)

    async def work() -> None:
        # The iterator is shared: each worker takes the next file that nobody has taken.
        for file in waiting:
            on_result(await _put(objects, ObjectRef(bucket, file.key), file))

    async with asyncio.TaskGroup() as workers:
        for _ in range(UPLOADS_AT_ONCE):
            workers.create_task(work())


async def _put(objects: ObjectStore, ref: ObjectRef, file: LocalFile) -> UploadResult:
    try:
        ref.key.encode()
        data = await asyncio.to_thread(_read, file.path)
        stat = await objects.put(ref, data, mimetypes.guess_type(file.path.name)[0] or "application/octet-stream")
    except UnicodeEncodeError:
        return UploadResult(file, ref, error="its name is not UTF-8, and so can be no key")
    except OSError as error:
        return UploadResult(file, ref, error=error.strerror or type(error).__name__)
    except (ImageSearchError, _TooLarge) as error:
        return UploadResult(file, ref, error=str(error))
    return UploadResult(file, ref, size=stat.size)


class _TooLarge(Exception):
    """The message names size and limit."""


def _read(path: Path) -> bytes:
    with path.open("rb") as opened:
        data = opened.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise _TooLarge(f"larger than {MOST_BYTES // 1024**2} MiB: put it with an S3 client")
    return data
