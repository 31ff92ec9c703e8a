"""A projection fitted on the pictures of a folder, a list or a bucket, in one pass and in bounded memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra import object_store
from infra.errors import ConfigurationError, ImageRejected, ObjectGone
from infra.object_store import ObjectStore
from infra.settings import ProcessorSettings
from processors.embedding.catalog import ModelDescription, fingerprint
from processors.embedding.projection_file import FittedMap, ProjectionFacts
from processors.training.extraction import BYTES_A_CHUNK, Extractor, ModelUnderTest, Sample, open_extractor
from processors.training.labelled import labelled_pictures
from processors.training.whitening import RunningMoments, oracle_shrinkage, whitening_matrix
from schemas.identity import ObjectRef

FILES_A_STEP: Final = 512
OBJECTS_AT_ONCE: Final = 32
"""They are read together, and in memory together."""

_LABEL: Final = "fitted on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """`source`: a folder or a list, or a bucket and what keys begin with. `every`: one picture of so many is taken.
    `shrinkage`: None: as the number of pictures calls for."""

    source: Path | ObjectRef
    dimension: int
    whitening: float
    shrinkage: float | None = None
    every: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """`kept`: share of the variance that lies in the directions that were kept. `refused`: pictures left out, by reason."""

    projection: FittedMap
    kept: float
    refused: Counter[str]


async def fit(
    asked: Fit,
    description: ModelDescription,
    settings: ProcessorSettings,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> Fitted:
    """On the vectors of the model without its projection. Raises ConfigurationError, and what the object store raises."""
    parent = description.unprojected()
    if not 0 < asked.dimension <= parent.dimension:
        raise ConfigurationError(
            f"vectors of {parent.name} have {parent.dimension} floats: --dimension is 1 to {parent.dimension}"
        )
    moments = RunningMoments(parent.dimension)
    refused: Counter[str] = Counter()
    async with open_extractor([ModelUnderTest(_LABEL, parent, settings)], seed=1, say=say) as extractor:
        source = asked.source
        steps = (
            _of_files(source, asked.every, extractor, moments)
            if isinstance(source, Path)
            else _of_bucket(source, asked.every, extractor, moments, settings)
        )
        async for step, left_out in steps:
            refused += left_out
            advance(step)
    return await asyncio.to_thread(_solve, asked, parent, moments, refused)


def _solve(asked: Fit, parent: ModelDescription, moments: RunningMoments, refused: Counter[str]) -> Fitted:
    shrinkage = (oracle_shrinkage(moments) if moments.count else 1.0) if asked.shrinkage is None else asked.shrinkage
    solved = whitening_matrix(moments, asked.dimension, whitening=asked.whitening, shrinkage=shrinkage)
    facts = ProjectionFacts(
        parent=fingerprint(parent, "fp32"),
        model=parent.name,
        columns=parent.dimension,
        dimension=asked.dimension,
        pictures=moments.count,
        whitening=asked.whitening,
        shrinkage=round(shrinkage, 6),
    )
    projection = FittedMap(facts, moments.mean.astype("float32"), solved.matrix.astype("float32"))
    return Fitted(projection, solved.kept, refused)


async def _of_files(
    source: Path, every: int, extractor: Extractor, moments: RunningMoments
) -> AsyncIterator[tuple[int, Counter[str]]]:
    pictures = (await asyncio.to_thread(labelled_pictures, source))[::every]
    for start in range(0, len(pictures), FILES_A_STEP):
        step = pictures[start : start + FILES_A_STEP]
        found = await extractor.extract([Sample(picture) for picture in step])
        await asyncio.to_thread(moments.add, found.vectors[_LABEL])
        yield len(step), found.refused


async def _of_bucket(
    source: ObjectRef, every: int, extractor: Extractor, moments: RunningMoments, settings: ProcessorSettings
) -> AsyncIterator[tuple[int, Counter[str]]]:
    store = await object_store.connect(settings)
    try:
        async for refs in _chosen(store, source, every):
            read = await asyncio.gather(*(_read(store, ref, settings.max_object_bytes) for ref in refs))
            vectors, refused = await extractor.extract_files([data for data in read if isinstance(data, bytes)])
            await asyncio.to_thread(moments.add, vectors[_LABEL])
            yield len(refs), refused + Counter(reason for reason in read if isinstance(reason, str))
    finally:
        await store.close()


async def _chosen(store: ObjectStore, source: ObjectRef, every: int) -> AsyncIterator[list[ObjectRef]]:
    seen, size, waiting = 0, 0, list[ObjectRef]()
    async for page in store.list_pages(source.bucket, prefix=source.key):
        for stat in page:
            if stat.is_directory_marker or stat.ref.is_reserved:
                continue
            seen += 1
            if (seen - 1) % every:
                continue
            if waiting and (len(waiting) == OBJECTS_AT_ONCE or size + stat.size > BYTES_A_CHUNK):
                yield waiting
                size, waiting = 0, []
            waiting.append(stat.ref)
            size += stat.size
    if waiting:
        yield waiting


async def _read(store: ObjectStore, ref: ObjectRef, most_bytes: int) -> bytes | str:
    """Its bytes, or why there are none."""
    try:
        return (await store.read(ref, max_bytes=most_bytes)).data
    except ImageRejected as error:
        return error.reason.value
    except ObjectGone:
        return "GONE"
