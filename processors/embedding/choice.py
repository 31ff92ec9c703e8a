"""The model that the settings ask for: a row of the catalog, or a checkpoint of one's own. Looks at no file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from infra.errors import ConfigurationError
from infra.settings import ModelSettings
from processors.embedding.catalog import (
    AUTO,
    CATALOG,
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    OWN_MODEL,
    BucketFile,
    Colour,
    FittedProjection,
    LocalFile,
    ModelDescription,
    Precision,
    WebFile,
    Weights,
    find,
)

_TORCHSCRIPT_PIXELS: Final = 224
_DIGEST: Final = "IMAGE_SEARCH_WEIGHTS_SHA256"
_OWN: Final = "IMAGE_SEARCH_OWN_WEIGHTS"
_PROJECTION: Final = "IMAGE_SEARCH_PROJECTION"


def chosen(settings: ModelSettings) -> ModelDescription:
    """Its digest is always known: the catalog's, else the operator's. With the projection of the settings, if there is one.

    Raises ConfigurationError for a model that there is not, and for settings that contradict it.
    """
    return replace(_projected(_chosen(settings), settings), calibration=settings.calibration_sha256)


def precision_asked(settings: ModelSettings) -> Precision:
    """Raises ConfigurationError while it is `auto`: active_model.py and fastest.py settle it."""
    if settings.model_precision == AUTO:
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: auto is settled when the collection is made, and there is none here: name one"
        )
    if settings.model_precision == "int8" and settings.model_backend == "torch":
        raise ConfigurationError("IMAGE_SEARCH_MODEL_PRECISION: int8 runs on IMAGE_SEARCH_MODEL_BACKEND=openvino only")
    return settings.model_precision


def _chosen(settings: ModelSettings) -> ModelDescription:
    if settings.model == OWN_MODEL:
        return _own(settings)
    row = find(settings.model)
    if settings.own_weights:
        raise ConfigurationError(f"{_OWN} is set, so IMAGE_SEARCH_MODEL must be {OWN_MODEL} and not {row.name}; or unset it")
    return replace(row, weights=replace(row.weights, sha256=_digest(row, settings.weights_sha256)))


def projected(description: ModelDescription, place: str, sha256: str, dimension: int) -> ModelDescription:
    """With a fitted projection in the place of what made its vectors shorter."""
    parent = description.unprojected()
    if dimension > parent.dimension:
        raise ConfigurationError(
            f"{_PROJECTION}_DIMENSION: vectors of {description.name} have at most {parent.dimension} floats, not {dimension}"
        )
    source = _source(place, _PROJECTION)
    file = Weights(
        file_name=_file_name(source, sha256), sha256=sha256, source=source, licence="its owner's", form="safetensors"
    )
    return replace(parent, projection=FittedProjection(file, parent.dimension), dimension=dimension)


def _projected(description: ModelDescription, settings: ModelSettings) -> ModelDescription:
    given = (settings.projection, settings.projection_sha256, settings.projection_dimension)
    if not any(given):
        return description
    if not all(given):
        raise ConfigurationError(
            f"{_PROJECTION}, {_PROJECTION}_SHA256 and {_PROJECTION}_DIMENSION go together: set all three, as "
            "`image-search fit-projection` printed them, or none"
        )
    return projected(description, *given)


def _digest(row: ModelDescription, given: str) -> str:
    known, file_name = row.weights.sha256, row.weights.file_name
    if known and given not in ("", known):
        raise ConfigurationError(f"{_DIGEST} is not the sha256 of {file_name}, which is known: {known}. Unset it.")
    if not known and not given:
        where = f" from {row.weights.source.url}" if isinstance(row.weights.source, WebFile) else ""
        raise ConfigurationError(
            f"the sha256 of {file_name}, which {row.name} needs, is published nowhere, so say it: get the file{where}, "
            f"run `sha256sum {file_name}`, and set {_DIGEST} to what it prints. It becomes part of the model's fingerprint."
        )
    return known or given


def _own(settings: ModelSettings) -> ModelDescription:
    if not settings.own_weights or not settings.weights_sha256:
        raise ConfigurationError(
            f"the model {OWN_MODEL} needs {_OWN} (a path, s3://bucket/key or an https address) and {_DIGEST}, "
            "which `sha256sum FILE` says"
        )
    weights = _own_weights(settings)
    mean, deviation = _colour(settings.own_mean), _colour(settings.own_deviation)
    if settings.own_format == "torchscript":
        if not settings.own_dimension:
            raise ConfigurationError("IMAGE_SEARCH_OWN_DIMENSION: say how many floats a vector of this TorchScript has")
        return ModelDescription(
            name=OWN_MODEL,
            network="torchscript",
            dimension=settings.own_dimension,
            input_size=(settings.own_input_pixels or _TORCHSCRIPT_PIXELS,) * 2,
            mean=mean or IMAGENET_MEAN,
            deviation=deviation or IMAGENET_DEVIATION,
            gem_power=None,
            projection=None,
            weights=weights,
        )
    row = CATALOG[settings.own_network]
    return replace(
        row,
        name=OWN_MODEL,
        dimension=_own_dimension(row, settings.own_dimension),
        input_size=(settings.own_input_pixels,) * 2 if settings.own_input_pixels else row.input_size,
        mean=mean or row.mean,
        deviation=deviation or row.deviation,
        weights=weights,
    )


def _own_dimension(row: ModelDescription, asked: int) -> int:
    most = row.dimension if row.projection is None else row.projection.columns
    if asked > most or (asked and row.projection is None and asked != most):
        some = f"at most {most}" if row.projection else f"always {most}"
        raise ConfigurationError(f"IMAGE_SEARCH_OWN_DIMENSION: vectors of {row.network} have {some} floats, not {asked}")
    return asked or row.dimension


def _own_weights(settings: ModelSettings) -> Weights:
    source = _source(settings.own_weights, _OWN)
    return Weights(
        file_name=_file_name(source, settings.weights_sha256),
        sha256=settings.weights_sha256,
        source=source,
        licence="its owner's",
        form=settings.own_format,
    )


def _file_name(source: LocalFile | BucketFile | WebFile, sha256: str) -> str:
    match source:
        case LocalFile(path):
            return PurePosixPath(path).name
        case BucketFile(_, place) | WebFile(place):
            # Every second checkpoint is called model.pth: two of them must not be taken for each other.
            return f"{sha256[:8]}-{PurePosixPath(urlsplit(place).path).name or 'weights'}"


def _source(place: str, setting: str) -> LocalFile | BucketFile | WebFile:
    scheme, separator, rest = place.partition("://")
    if not separator:
        return LocalFile(place)
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        if bucket and key:
            return BucketFile(bucket, key)
    if scheme == "https" and urlsplit(place).hostname:
        return WebFile(place)
    raise ConfigurationError(f"{setting} is a path, s3://bucket/key or an https address")


def _colour(numbers: tuple[float, ...]) -> Colour | None:
    return (numbers[0], numbers[1], numbers[2]) if numbers else None
