"""Files to vectors of several models side by side, by the product's own code: decode processes, then the model's thread."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra.errors import ImageRejected
from infra.settings import ProcessorSettings
from processors.decode import Decoded
from processors.decode_pool import DecodePool
from processors.embedding import check_golden, open_embedder
from processors.embedding.catalog import ModelDescription
from processors.embedding.embedder import Embedder, Vectors
from processors.raster import DecodeRules
from processors.training.copies import CopyRenderer, ask_for
from processors.training.edits import Edit
from processors.training.labelled import LabelledPicture
from schemas.events import ReasonCode

SAMPLES_A_CHUNK = 64
BYTES_A_CHUNK = 64 * 1024 * 1024
CHUNKS_AT_ONCE = 2
"""One is decoded while the other one is embedded."""

EDIT_TIME_FACTOR = 4
"""A copy is decoded three times and edited once: it may take this many times as long as a picture."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture as it is, or an edited copy of it."""

    picture: LabelledPicture
    edit: Edit | None = None


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """`label`: how people see it; different for each. `settings`: of the backend that runs it."""

    label: str
    description: ModelDescription
    settings: ProcessorSettings


@dataclass(frozen=True, slots=True, eq=False)
class Extracted:
    """`kept`: places of the samples that every model took. `vectors`: by label, a row for each of these; `digests`: of
    their files. `refused`: how many samples were refused for which reason."""

    kept: list[int]
    vectors: dict[str, Vectors]
    digests: list[bytes]
    refused: Counter[str]


@dataclass(frozen=True, slots=True)
class _OpenModel:
    label: str
    rules: DecodeRules
    embedder: Embedder


class Extractor:
    """Made by `open_extractor`. Vectors of all samples are held: 4 bytes × dimension for each sample and model."""

    def __init__(self, models: Sequence[_OpenModel], pools: dict[DecodeRules, DecodePool], most_bytes: int) -> None:
        self._models = models
        self._pools = pools
        self._most_bytes = most_bytes

    async def extract(self, samples: Sequence[Sample], advance: Callable[[int], None] = lambda _: None) -> Extracted:
        """A sample that one model's decoding refuses is left out for all, so that all are asked the same."""
        vectors = {model.label: np.zeros((len(samples), model.embedder.dimension), dtype=np.float32) for model in self._models}
        digests: list[bytes | None] = [None] * len(samples)
        refused: Counter[str] = Counter()
        chunks = _chunks(samples)

        async def work() -> None:
            for places in chunks:
                files = await asyncio.to_thread(self._read, [samples[place].picture.path for place in places])
                refused.update(reason for reason in files if isinstance(reason, str))
                read = {place: data for place, data in zip(places, files, strict=True) if isinstance(data, bytes)}
                asked = {place: ask_for(data, samples[place].edit) for place, data in read.items()}
                taken, reasons = await self._embed(asked, vectors)
                refused.update(reasons)
                for place in taken:
                    digests[place] = hashlib.sha256(read[place]).digest()
                advance(len(places))

        async with asyncio.TaskGroup() as group:
            for _ in range(CHUNKS_AT_ONCE):
                group.create_task(work())
        kept = [place for place, digest in enumerate(digests) if digest is not None]
        return Extracted(
            kept=kept,
            vectors={label: rows[kept] for label, rows in vectors.items()},
            digests=[digest for digest in digests if digest is not None],
            refused=refused,
        )

    async def extract_files(self, files: Sequence[bytes]) -> tuple[dict[str, Vectors], Counter[str]]:
        """The same of contents in memory, where nobody asks which vector is whose: vectors by label, and what was refused."""
        vectors = {model.label: np.zeros((len(files), model.embedder.dimension), dtype=np.float32) for model in self._models}
        taken, reasons = await self._embed({place: ask_for(data, None) for place, data in enumerate(files)}, vectors)
        return {label: rows[taken] for label, rows in vectors.items()}, Counter(reasons)

    async def _embed(self, asked: dict[int, bytes], vectors: dict[str, Vectors]) -> tuple[list[int], list[str]]:
        """Which samples every model took, their vectors written to their places, and why the others were refused."""
        decoded = {rules: await pool.decode(list(asked.values())) for rules, pool in self._pools.items()}
        taken: list[int] = []
        rows: list[int] = []
        reasons: list[str] = []
        for row, (place, outcomes) in enumerate(zip(asked, zip(*decoded.values(), strict=True), strict=True)):
            reason = next((outcome.reason.value for outcome in outcomes if isinstance(outcome, ImageRejected)), None)
            if reason is None:
                taken.append(place)
                rows.append(row)
            else:
                reasons.append(reason)
        if taken:
            for model in self._models:
                pictures = [decoded[model.rules][row] for row in rows]
                pixels = np.stack([picture.pixels for picture in pictures if isinstance(picture, Decoded)])
                vectors[model.label][taken] = await model.embedder.embed(pixels)
        return taken, reasons

    def _read(self, paths: Iterable[Path]) -> list[bytes | str]:
        return [_read(path, self._most_bytes) for path in paths]


@asynccontextmanager
async def open_extractor(
    models: Sequence[ModelUnderTest], *, seed: int, say: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Extractor]:
    """Every model loaded, held to its golden vectors, and its decode processes started. Raises ConfigurationError."""
    async with AsyncExitStack() as stack:
        pools: dict[DecodeRules, DecodePool] = {}
        opened = []
        for model in models:
            embedder = await open_embedder(model.description, model.settings, say)
            stack.push_async_callback(embedder.close)
            await check_golden(embedder, model.description)
            rules = model.description.decode_rules(model.settings)
            opened.append(_OpenModel(model.label, rules, embedder))
            if rules not in pools:
                pools[rules] = DecodePool(
                    rules,
                    workers=model.settings.decode_workers,
                    timeout_seconds=model.settings.decode_timeout_seconds * EDIT_TIME_FACTOR,
                    memory_mib=model.settings.decode_memory_mib,
                    renderer=CopyRenderer(seed),
                )
                stack.push_async_callback(pools[rules].close)
                await pools[rules].start()
        yield Extractor(opened, pools, min(model.settings.max_object_bytes for model in models))


def _chunks(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Places of samples, so many that their files fit into BYTES_A_CHUNK; at least one."""
    chunk: list[int] = []
    size = 0
    for place, sample in enumerate(samples):
        try:
            next_size = sample.picture.path.stat().st_size
        except OSError:
            next_size = 0
        if chunk and (len(chunk) == SAMPLES_A_CHUNK or size + next_size > BYTES_A_CHUNK):
            yield chunk
            chunk, size = [], 0
        chunk.append(place)
        size += next_size
    if chunk:
        yield chunk


def _read(path: Path, most_bytes: int) -> bytes | str:
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError:
        return ReasonCode.OBJECT_UNREADABLE.value
    return data if len(data) <= most_bytes else ReasonCode.OBJECT_TOO_LARGE.value
