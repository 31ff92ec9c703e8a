"""Where a model's weights are, and that they are the right ones."""

from __future__ import annotations

import hashlib
import importlib.util
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings, QuerySettings
from processors.embedding.catalog import (
    BucketFile,
    FittedProjection,
    LocalFile,
    ModelDescription,
    TorchvisionFile,
    WebFile,
    WheelFile,
)
from processors.embedding.download import download
from processors.embedding.file_lock import locked


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
    path = find_weights(description, folders) or _download(description, folders, say)
    found = file_digest(path)
    if found != description.weights.sha256:
        raise ConfigurationError(
            f"{path} is not the file that {description.name} needs: its sha256 is {found}, not {description.weights.sha256}. "
            "Remove it or replace it."
        )
    return path


def obtain_projection(description: ModelDescription, folders: WeightFolders, say: Callable[[str], None]) -> Path | None:
    """The file of the projection, in the same way; None for a model without a fitted one."""
    asked = wanted_projection(description)
    return None if asked is None else obtain(asked, folders, say)


def wanted_projection(description: ModelDescription) -> ModelDescription | None:
    """The description with the file of its projection in the place of its weights: it is found and brought as they are."""
    projection = description.projection
    return replace(description, weights=projection.file) if isinstance(projection, FittedProjection) else None


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_hand(description: ModelDescription, folders: WeightFolders) -> str:
    """What a person can do instead."""
    weights = description.weights
    where = f" from {weights.source.url}" if isinstance(weights.source, WebFile) else ""
    return f"Get {weights.file_name} (sha256 {weights.sha256}){where} by hand and put it into {folders.by_hand}."


def partial_download(description: ModelDescription, folders: WeightFolders) -> Path:
    """Where a download grows; named by its digest, so that no other file is gone on with."""
    weights = description.weights
    return folders.downloads / f".{weights.file_name}.{weights.sha256[:16]}.partial"


def find_weights(description: ModelDescription, folders: WeightFolders) -> Path | None:
    """The first file of the right name on this host; nothing of it is checked."""
    weights = description.weights
    if isinstance(weights.source, LocalFile):
        places = [Path(weights.source.path)]
    else:
        places = [folder / weights.file_name for folder in (folders.own, folders.downloads) if folder is not None]
    if isinstance(weights.source, WheelFile):
        # Found without importing the package, which would run its code.
        package = importlib.util.find_spec(weights.source.package)
        places += (
            [Path(folder) / weights.source.path for folder in (package.submodule_search_locations or ())] if package else []
        )
    return next((place for place in places if place.is_file()), None)


def _download(description: ModelDescription, folders: WeightFolders, say: Callable[[str], None]) -> Path:
    url = _url(description, folders)
    target = folders.downloads / description.weights.file_name
    partial = partial_download(description, folders)
    try:
        folders.downloads.mkdir(parents=True, exist_ok=True)
        with locked(partial.with_suffix(".lock")):
            if not target.is_file():
                say(f"downloading {target.name}")
                _download_checked(url, partial, description, folders, say)
                partial.replace(target)
    except OSError as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        kept = partial.exists() and f" {partial.stat().st_size / 1e6:.0f} MB came and are kept: try again to go on from there."
        raise ConfigurationError(
            f"the weights of {description.name} cannot be downloaded ({reason}).{kept or ''} {by_hand(description, folders)}"
        ) from error
    return target


def _download_checked(
    url: str, partial: Path, description: ModelDescription, folders: WeightFolders, say: Callable[[str], None]
) -> None:
    """Leaves the right file in `partial`, or none, or a part of one."""
    while True:
        begun = partial.exists()
        try:
            download(url, partial, say)
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()
        if partial.exists() and file_digest(partial) == description.weights.sha256:
            return
        partial.unlink(missing_ok=True)
        if not begun:
            raise ConfigurationError(
                f"what was downloaded for {description.name} is not the expected file. {by_hand(description, folders)}"
            )
        # What was left of an earlier try may be of another file, or damaged.
        say("  this is not the expected file; once more from its begin")


def _url(description: ModelDescription, folders: WeightFolders) -> str:
    """Raises ConfigurationError for weights that no download can bring."""
    weights, source = description.weights, description.weights.source
    match source:
        case TorchvisionFile():
            return _torchvision_url(source)
        case WebFile(url):
            return url
        case WheelFile(package):
            why = f"the weights of {description.name} come with the package {package}"
        case BucketFile(bucket, key):
            why = f"s3://{bucket}/{key} has not been brought here"
        case LocalFile(path):
            fitted = isinstance(description.projection, FittedProjection) and weights == description.projection.file
            setting = "IMAGE_SEARCH_PROJECTION" if fitted else "IMAGE_SEARCH_OWN_WEIGHTS"
            raise ConfigurationError(f"{setting}: there is no file {path}")
        case never:
            assert_never(never)
    raise ConfigurationError(f"{why}. {by_hand(description, folders)}")


def _torchvision_url(source: TorchvisionFile) -> str:
    from torchvision.models import get_weight  # type: ignore[import-untyped]  # noqa: PLC0415 - imports torch

    return str(get_weight(source.weights).url)
