"""What this host's processor can do."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from infra.errors import ConfigurationError
from processors.embedding.catalog import Precision

PROCESSOR_FACTS: Final = Path("/proc/cpuinfo")
_BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})
_INT8_FLAGS: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


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
