"""A file by https, gone on with where an earlier try was cut off."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from infra.errors import ConfigurationError

STALL_SECONDS = 30.0
"""Longest silence of a server during a download."""

LARGEST_DOWNLOAD_BYTES = 2 * 1024**3
_CHUNK_BYTES = 1024 * 1024
_MEGABYTE = 1e6
_STEPS = 10
"""How often progress is told, in all."""
_STEP_BYTES = 50_000_000
"""How often it is told when the server does not say how large the file is."""


def download(url: str, partial: Path, say: Callable[[str], None]) -> None:
    """Bring all of the file into `partial`, behind what is there of it already. What came stays there when this fails.

    A connection that breaks is made again for as long as each brings something. Raises OSError. Whether it is the right file
    is for the caller to check: also the begin, which may be of another one.
    """
    if not url.startswith("https://"):
        raise ConfigurationError("weights are downloaded by https only")
    while True:
        before = _size(partial)
        try:
            _go_on(url, partial, say)
        except (OSError, http.client.HTTPException) as error:
            if _size(partial) > before:
                say(f"  the connection broke at {_size(partial) / _MEGABYTE:.0f} MB; going on from there")
                continue
            raise error if isinstance(error, OSError) else OSError("the server does not speak HTTP as it should") from error
        else:
            return


def _go_on(url: str, partial: Path, say: Callable[[str], None]) -> None:
    done = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})  # noqa: S310 - https, above
    try:
        answer = urllib.request.urlopen(request, timeout=STALL_SECONDS)  # noqa: S310 - https, above
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not done:
            raise
        # All of it is there, or it is the begin of something longer: the digest will tell.
        return
    with answer, partial.open("ab") as file:
        if not answer.url.startswith("https://"):
            raise OSError("the server sends us on to an address without https")
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            done = 0
            file.truncate(0)
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            file.truncate(0)
            raise OSError("the server sent another part than it was asked for")
        length = answer.headers.get("Content-Length")
        _copy(answer, file, done, done + int(length) if length else None, say)


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, done: int, total: int | None, say: Callable[[str], None]) -> None:
    of_total = f" of {total / _MEGABYTE:.0f}" if total else ""
    if done:
        say(f"  going on at {done / _MEGABYTE:.0f}{of_total} MB")
    step = total // _STEPS + 1 if total else _STEP_BYTES
    try:
        while chunk := answer.read(_CHUNK_BYTES):
            if done + len(chunk) > LARGEST_DOWNLOAD_BYTES:
                file.truncate(0)
                raise OSError("the file is too large")
            file.write(chunk)
            done += len(chunk)
            if done // step > (done - len(chunk)) // step or done == total:
                say(f"  {done / _MEGABYTE:.0f}{of_total} MB")
    finally:
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done < total:
        raise OSError(f"the connection ended after {done / _MEGABYTE:.0f}{of_total} MB")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
