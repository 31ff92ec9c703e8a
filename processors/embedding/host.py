"""What this host's processor can do."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from infra.errors import ConfigurationError
from processors.embedding.catalog import Precision

PROCESSOR_FACTS: Final = Path("/proc/cpuinfo")
_BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16"})


def check_precision(precision: Precision) -> None:
    """Raises ConfigurationError where the processor has no bf16.

    Both runtimes would run it all the same: one slower than fp32, by taking numbers apart, the other in fp32 without a word.
    """
    if precision == "bf16" and not _BF16_FLAGS & _flags():
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: the processor of this host has no bf16 (avx512_bf16 or amx_bf16). Use fp32, or "
            "run this service on a host that has it: vectors of the two precisions do not share a collection"
        )


def _flags() -> set[str]:
    for line in PROCESSOR_FACTS.read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "flags":
            return set(values.split())
    return set()
