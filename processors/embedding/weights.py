"""Where a model's weights are, and that they are the right ones."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings, QuerySettings
from processors.embedding.catalog import ModelDescription, TorchvisionFile, WheelFile

STALL_SECONDS = 30.0
"""Longest silence of a server during a download."""

LARGEST_DOWNLOAD_BYTES = 2 * 1024**3
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class WeightFolders:
    """`own`: the operator's folder, looked into first. `downloads`: where downloads are kept; may not be there yet."""

    own: Path | None
    downloads: Path

    @classmethod
    def from_settings(cls, settings: ProcessorSettings | QuerySettings) -> WeightFolders:
        return cls(own=settings.weights_dir, downloads=settings.cache_dir / "weights")

    @property
    def by_hand(self) -> Path:
        return self.own or self.downloads


def obtain(description: ModelDescription, folders: WeightFolders, say: Callable[[str], None]) -> Path:
    """The file of the weights, its digest checked; downloaded if need be. Blocks: run it off the event loop.

    Raises ConfigurationError that says which file to put where by hand.
    """
    path = _find(description, folders)
    if path is None:
        path = _download(description, folders, say)
    found = file_digest(path)
    if found != description.weights.sha256:
        raise ConfigurationError(
            f"{path} is not the file that {description.name} needs: its sha256 is {found}, not {description.weights.sha256}. "
            "Remove it or replace it."
        )
    return path


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(description: ModelDescription, folders: WeightFolders) -> Path | None:
    weights = description.weights
    places = [folder / weights.file_name for folder in (folders.own, folders.downloads) if folder is not None]
    if isinstance(weights.source, WheelFile):
        # Found without importing the package, which would run its code.
        package = importlib.util.find_spec(weights.source.package)
        places += (
            [Path(folder) / weights.source.path for folder in (package.submodule_search_locations or ())] if package else []
        )
    return next((place for place in places if place.is_file()), None)


def _download(description: ModelDescription, folders: WeightFolders, say: Callable[[str], None]) -> Path:
    weights = description.weights
    by_hand = f"Get {weights.file_name} (sha256 {weights.sha256}) by hand and put it into {folders.by_hand}."
    if not isinstance(weights.source, TorchvisionFile):
        raise ConfigurationError(f"the weights of {description.name} come with the package {weights.source.package}. {by_hand}")
    url = _torchvision_url(weights.source)
    say(f"downloading {weights.file_name}")
    folders.downloads.mkdir(parents=True, exist_ok=True)
    target = folders.downloads / weights.file_name
    partial = folders.downloads / f".{weights.file_name}.{os.getpid()}.partial"
    try:
        _fetch(url, partial, say)
        if file_digest(partial) != weights.sha256:
            raise ConfigurationError(f"what was downloaded for {description.name} is not the expected file. {by_hand}")
        partial.replace(target)
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise ConfigurationError(f"the weights of {description.name} cannot be downloaded ({reason}). {by_hand}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _torchvision_url(source: TorchvisionFile) -> str:
    from torchvision.models import get_weight  # type: ignore[import-untyped]  # noqa: PLC0415 - imports torch

    return str(get_weight(source.weights).url)


def _fetch(url: str, target: Path, say: Callable[[str], None]) -> None:
    if not url.startswith("https://"):
        raise ConfigurationError("weights are downloaded by https only")
    with urllib.request.urlopen(url, timeout=STALL_SECONDS) as answer, target.open("wb") as file:  # noqa: S310 - https, above
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while chunk := answer.read(_CHUNK_BYTES):
            done += len(chunk)
            if done > LARGEST_DOWNLOAD_BYTES:
                raise OSError("the file is too large")
            file.write(chunk)
            if total and done * 10 // total > (done - len(chunk)) * 10 // total:
                say(f"  {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        file.flush()
        os.fsync(file.fileno())
