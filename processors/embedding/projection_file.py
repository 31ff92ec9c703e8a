"""The file of a fitted projection: a mean, a matrix, and what they were fitted on. In the form safetensors, read without torch.

The form is a length, a header of JSON, and the numbers: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from infra.errors import ConfigurationError
from processors.embedding.catalog import ModelDescription, fingerprint

Matrix = npt.NDArray[np.float32]

_ALIGNMENT: Final = 8
_LENGTH_BYTES: Final = 8
_LARGEST_HEADER_BYTES: Final = 64 * 1024
_LARGEST_SIDE: Final = 32768
_FLOAT_BYTES: Final = 4


class ProjectionFacts(BaseModel):
    """What the file says about itself. `parent`: fingerprint, in fp32, of the model whose vectors it was fitted on.

    `whitening`: the power of each direction's deviation that it is divided by, 0 (none) to 1 (to the same in all).
    `shrinkage`: how far the deviations were drawn to their mean before, 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["image-search/projection/1"] = "image-search/projection/1"
    parent: str = Field(pattern=r"^[0-9a-f]{64}$")
    model: str
    columns: int = Field(ge=1, le=_LARGEST_SIDE)
    dimension: int = Field(ge=1, le=_LARGEST_SIDE)
    pictures: PositiveInt
    whitening: float = Field(ge=0, le=1)
    shrinkage: float = Field(ge=0, le=1)


@dataclass(frozen=True, slots=True, eq=False)
class FittedMap:
    """A unit vector x becomes matrix · (x - mean), made a unit vector again. Shapes (dimension, columns) and (columns,)."""

    facts: ProjectionFacts
    mean: Matrix
    matrix: Matrix


class _Tensor(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["F32"] = "F32"
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: ProjectionFacts = Field(alias="__metadata__")
    mean: _Tensor
    matrix: _Tensor


def write_projection(path: Path, fitted: FittedMap) -> None:
    """Whole or not at all; the same projection gives the same bytes. Raises OSError."""
    facts = fitted.facts
    mean, matrix = _tensors(facts)
    header = json.dumps(
        {
            # The form knows text here and nothing else.
            "__metadata__": {name: str(value) for name, value in facts.model_dump().items()},
            "mean": mean.model_dump(),
            "matrix": matrix.model_dump(),
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
            for numbers in (fitted.mean, fitted.matrix):
                file.write(np.ascontiguousarray(numbers, dtype="<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_projection(path: Path, description: ModelDescription) -> FittedMap:
    """For a model with this projection. Raises ConfigurationError when it is damaged, or was fitted for something else."""
    fitted = read_any_projection(path)
    facts, parent = fitted.facts, description.unprojected()
    if facts.parent != fingerprint(parent, "fp32"):
        raise ConfigurationError(
            f"{path} was fitted on vectors of another model ({facts.model}, fingerprint {facts.parent[:16]}) than "
            f"{description.name} ({fingerprint(parent, 'fp32')[:16]}): fit it anew with `image-search fit-projection`"
        )
    if (facts.dimension, facts.columns) != (description.dimension, parent.dimension):
        raise ConfigurationError(
            f"{path} makes {facts.dimension} floats of {facts.columns}, not {description.dimension} of {parent.dimension}: "
            f"IMAGE_SEARCH_PROJECTION_DIMENSION={facts.dimension}"
        )
    return fitted


def read_any_projection(path: Path) -> FittedMap:
    """Whatever model it was fitted for. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _LARGEST_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = _Header.model_validate_json(file.read(length))
            mean, matrix = _tensors(header.facts)
            if (header.mean, header.matrix) != (mean, matrix):
                raise ValueError("the numbers are not where they should be")
            size = matrix.data_offsets[1]
            numbers = file.read(size + 1)
            if len(numbers) != size:
                raise ValueError("the file has another length")
    except OSError as error:
        raise ConfigurationError(f"the projection {path} cannot be read: {error.strerror}") from None
    except (ValidationError, ValueError) as error:
        raise ConfigurationError(
            f"{path} is no projection of `image-search fit-projection` that this version knows, or a damaged one"
        ) from error
    fitted = FittedMap(header.facts, _part(numbers, mean), _part(numbers, matrix))
    if not np.isfinite(fitted.mean).all() or not np.isfinite(fitted.matrix).all():
        raise ConfigurationError(f"the projection {path} holds numbers that are none")
    return fitted


def _tensors(facts: ProjectionFacts) -> tuple[_Tensor, _Tensor]:
    """Mean and matrix as they lie in the file."""
    begin = facts.columns * _FLOAT_BYTES
    end = begin + facts.dimension * facts.columns * _FLOAT_BYTES
    return (
        _Tensor(shape=(facts.columns,), data_offsets=(0, begin)),
        _Tensor(shape=(facts.dimension, facts.columns), data_offsets=(begin, end)),
    )


def _part(numbers: bytes, tensor: _Tensor) -> npt.NDArray[Any]:
    begin, end = tensor.data_offsets
    # A copy: torch warns about memory that it must not write to.
    return np.frombuffer(numbers[begin:end], dtype="<f4").astype(np.float32).reshape(tensor.shape)
