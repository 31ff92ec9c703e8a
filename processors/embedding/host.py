"""What this host can do: its processor, and a GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from infra.errors import ConfigurationError
from infra.settings import ModelSettings
from processors.embedding.catalog import Precision

PROCESSOR_FACTS: Final = Path("/proc/cpuinfo")
_BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})
_INT8_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def check_host(settings: ModelSettings, precision: Precision) -> None:
    """Raises ConfigurationError where the device that the settings ask for is missing, or cannot compute in this precision."""
    if uses_gpu(settings):
        check_gpu_precision(precision)
    else:
        check_precision(precision)


def uses_gpu(settings: ModelSettings) -> bool:
    """Raises ConfigurationError where a GPU is asked for and there is none that can be used."""
    if settings.model_backend != "torch":
        if settings.model_device == "cuda":
            raise ConfigurationError("IMAGE_SEARCH_MODEL_DEVICE: cuda needs IMAGE_SEARCH_MODEL_BACKEND=torch")
        return False
    if settings.model_device == "cpu":
        return False
    # Imported here: a process that serves on OpenVINO must not load torch.
    import torch  # noqa: PLC0415

    if torch.cuda.is_available():
        return True
    if settings.model_device == "cuda":
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU that it can use"
        raise ConfigurationError(
            f"IMAGE_SEARCH_MODEL_DEVICE: {why} on this host; `nvidia-smi` shows what its driver sees. Use auto or cpu, or run "
            "this service on a host that has one"
        )
    return False


def check_gpu_precision(precision: Precision) -> None:
    """Raises ConfigurationError where the GPU has no bf16 of its own: torch would take numbers apart, slower than fp32."""
    import torch  # noqa: PLC0415

    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: the GPU of this host has no bf16 (Ampere and later have it). Use fp32, or "
            "IMAGE_SEARCH_MODEL_DEVICE=cpu where the processor has it: vectors of the two precisions do not share a collection"
        )


def check_precision(precision: Precision) -> None:
    """Raises ConfigurationError where the processor has no bf16, or no instructions that add up products of int8.

    The runtimes would run both all the same. bf16: one slower than fp32, by taking numbers apart, the other in fp32 without a
    word. int8: sums of two products are cut off at 16 bits, which gives other vectors.
    """
    if precision == "bf16" and not _BF16_FLAGS & _flags():
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: the processor of this host has no bf16 (avx512_bf16 or amx_bf16). Use fp32, or "
            "run this service on a host that has it: vectors of the two precisions do not share a collection"
        )
    if precision == "int8" and not _INT8_FLAGS & _flags():
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: the processor of this host has no VNNI (avx512_vnni, avx_vnni or amx_int8), without "
            "which int8 computes other vectors. Use fp32, or run this service on a host that has it: vectors of the two "
            "precisions do not share a collection"
        )


def _flags() -> set[str]:
    for line in PROCESSOR_FACTS.read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "flags":
            return set(values.split())
    return set()
