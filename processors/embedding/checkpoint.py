"""A file of weights to named tensors, by ways that run nothing of what the file holds. Imports torch: never in a service."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter

from infra.errors import ConfigurationError
from processors.embedding.catalog import WeightsForm

State: TypeAlias = Mapping[str, torch.Tensor]

_NESTED_UNDER: Final = ("state_dict", "model")
"""Training programs put more into the file than the weights, and these under one of these names."""


def _maker(value: np.ndarray[Any, Any] | np.float64) -> Callable[..., object]:
    """The function that a pickle of `value` names."""
    made_by: object = value.__reduce__()[0]
    assert callable(made_by)
    return made_by


_array_of, _number_of = _maker(np.zeros(1)), _maker(np.float64(0))

_PLAIN_ARRAYS: Final[list[Callable[..., object] | tuple[Callable[..., object], str]]] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")),
    # Files name these two by where NumPy 1 had them, or where NumPy 2 has them.
    _array_of,
    _number_of,
    (_array_of, "numpy.core.multiarray._reconstruct"),
    (_number_of, "numpy.core.multiarray.scalar"),
]
"""What a NumPy array of numbers is made of in a pickle. None of it runs anything that the file brings."""

_LOAD_ERRORS: Final = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What damaged and hostile files have made torch raise."""

_LARGEST_HEADER_BYTES: Final = 100_000_000
"""As the format's own library has it."""

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Kinds of numbers as safetensors names them, of those that weights are kept in."""


def read_state(path: Path, form: WeightsForm) -> State:
    """The tensors of a file whose digest was checked. Raises ConfigurationError when it is something else."""
    if form == "safetensors":
        return _safetensors(path)
    if _is_torchscript(path):
        raise ConfigurationError(
            f"{path} is TorchScript, which is a program. If you trust who made it: IMAGE_SEARCH_MODEL=own and "
            "IMAGE_SEARCH_OWN_FORMAT=torchscript"
        )
    try:
        # Only tensors and plain values: a pickle could run code. Arrays lie beside the weights of some retrieval networks.
        with path.open("rb") as file, torch.serialization.safe_globals(_PLAIN_ARRAYS):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (*_LOAD_ERRORS, MemoryError) as error:
        # Not in torch's words: they tell people to switch its safety off.
        raise ConfigurationError(
            f"{path} does not hold the weights of a network: it is damaged, or of another form (IMAGE_SEARCH_OWN_FORMAT), or "
            "holds more than tensors, which is refused because that could run code"
        ) from error
    return _tensors(loaded, path)


def _is_torchscript(path: Path) -> bool:
    """As torch itself tells it. It would refuse such a file, too, but not say why."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _tensors(loaded: object, path: Path) -> State:
    for name in _NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(values, torch.Tensor) for name, values in loaded.items()
    ):
        raise ConfigurationError(f"{path} does not hold the weights of a network: it is no state dict")
    # As DataParallel names them.
    return {name.removeprefix("module."): values for name, values in loaded.items()}


class _Tensor(BaseModel):
    """A line of the header. `data_offsets`: begin and end, behind the header."""

    model_config = ConfigDict(strict=True, frozen=True)

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


_HEADER: Final = TypeAdapter(dict[str, _Tensor | dict[str, str]])
"""One entry, `__metadata__`, holds remarks."""


def _safetensors(path: Path) -> State:
    """The format is a length, a header of JSON, and the numbers: https://github.com/huggingface/safetensors"""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER_BYTES:
            raise ConfigurationError(f"{path} is no safetensors file: its header would have {length} bytes")
        header, numbers = file.read(length), file.read()
    try:
        tensors = _HEADER.validate_json(header)
        return {name: _tensor(part, numbers) for name, part in tensors.items() if isinstance(part, _Tensor)}
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"{path} is no safetensors file, or a damaged one") from error


def _tensor(described: _Tensor, numbers: bytes) -> torch.Tensor:
    dtype = _DTYPES[described.dtype]
    begin, end = described.data_offsets
    if not begin <= end <= len(numbers) or end - begin != math.prod(described.shape) * dtype.itemsize:
        raise ValueError("the numbers of a tensor are not where its header says")
    # A copy: torch warns about memory that it must not write to.
    part = bytearray(numbers[begin:end])
    return (torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)).reshape(described.shape)


def write_safetensors(path: Path, state: State, remarks: Mapping[str, str]) -> None:
    """Whole or not at all. Tensors of any device; the same tensors and remarks make the same bytes."""
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(sorted(remarks.items()))}
    end = 0
    for name, values in state.items():
        begin, end = end, end + values.numel() * values.element_size()
        header[name] = {"dtype": kinds[values.dtype], "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The numbers begin at a multiple of eight, as the format's own library has it.
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in state.values():
            file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
