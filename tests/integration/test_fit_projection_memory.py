"""Fitting takes no more memory for many pictures than for few: of a folder, and of a bucket."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from infra import object_store
from infra.object_store.memory import MemoryObjectStore
from infra.settings import CommonSettings, ProcessorSettings
from processors.embedding.catalog import CATALOG
from processors.training import fit_projection
from processors.training.extraction import SAMPLES_A_CHUNK
from processors.training.fit_projection import Fit, fit
from schemas.identity import ObjectRef
from tests.pictures import jpeg

LITE0 = CATALOG["efficientnet_lite0"]
FEW, MANY = 150, 1200
DIFFERENT = 150
PIXELS_BYTES = 224 * 224 * 3
ROOM_BYTES = 2 * SAMPLES_A_CHUNK * PIXELS_BYTES
"""What may differ by chance: do two chunks meet in memory, and the stack that one is made of? That is 19 MB; the pixels of the
1050 pictures more are 158 MB."""


def contents() -> list[bytes]:
    return [jpeg(number, (160, 120)) for number in range(DIFFERENT)]


async def peak_bytes(source: Path | ObjectRef, pictures: int) -> int:
    """Most memory that Python and numpy held at once while this many pictures were fitted on."""
    asked = Fit(source=source, dimension=16, whitening=0.5)
    tracemalloc.start()
    try:
        fitted = await fit(asked, LITE0, ProcessorSettings(), lambda _: None, lambda _: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fitted.projection.facts.pictures == pictures and np.isfinite(fitted.projection.matrix).all()
    return peak


async def test_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step's vectors are held until they are added: the few fill one, too.
    monkeypatch.setattr(fit_projection, "FILES_A_STEP", DIFFERENT - 10)
    peaks: list[int] = []
    files = contents()
    for count in (FEW, FEW, MANY):  # the first one also imports
        folder = tmp_path / f"{count}-{len(peaks)}"
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:04}.jpg").write_bytes(files[number % DIFFERENT])
        peaks.append(await peak_bytes(folder, count))
    assert peaks[2] < peaks[1] + ROOM_BYTES


async def test_of_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryObjectStore()
    files = contents()
    await store.ensure_bucket("pictures")
    for number in range(MANY):
        await store.put(
            ObjectRef("pictures", f"{'few' if number < FEW else 'more'}/{number:04}.jpg"), files[number % DIFFERENT]
        )

    async def connect(_: CommonSettings) -> MemoryObjectStore:
        await asyncio.sleep(0)
        return store

    monkeypatch.setattr(object_store, "connect", connect)
    await peak_bytes(ObjectRef("pictures", "few/"), FEW)
    few = await peak_bytes(ObjectRef("pictures", "few/"), FEW)
    assert await peak_bytes(ObjectRef("pictures", ""), MANY) < few + ROOM_BYTES
