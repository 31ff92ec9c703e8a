"""Files to vectors of several models side by side, by the product's own code: decode processes, then the model's thread."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from infra.errors import ImageRejected
from infra.settings import ModelSettings, ProcessorSettings
from processors.decode import Decoded
from processors.decode_pool import DecodePool
from processors.embedding import check_golden, open_embedder
from processors.embedding.catalog import ModelDescription
from processors.embedding.embedder import Pixels, Vectors
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
    """A picture as it is, or a copy of it with some edits, one upon the other. Another `draw`: another copy."""

    picture: LabelledPicture
    edits: tuple[Edit, ...] = ()
    draw: int = 0

    @property
    def edit(self) -> Edit | None:
        """The only one, or the first."""
        return self.edits[0] if self.edits else None


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


class PixelEmbedder(Protocol):
    """What is needed of an Embedder here; a network that is being trained has no fingerprint yet."""

    @property
    def dimension(self) -> int: ...

    async def embed(self, pixels: Pixels) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Whatever makes vectors of pictures that were decoded by these rules."""

    label: str
    rules: DecodeRules
    embedder: PixelEmbedder


class Extractor:
    """Vectors of all samples are held: 4 bytes × dimension for each sample and model. The pools are started already."""

    def __init__(self, models: Sequence[OpenModel], pools: dict[DecodeRules, DecodePool], most_bytes: int) -> None:
        self._models = models
        self._pools = pools
        self._most_bytes = most_bytes

    async def extract(self, samples: Sequence[Sample], advance: Callable[[int], None] = lambda _: None) -> Extracted:
        """A sample that one model's decoding refuses is left out for all, so that all are asked the same."""
        vectors = {model.label: np.zeros((len(samples), model.embedder.dimension), dtype=np.float32) for model in self._models}
        digests: list[bytes | None] = [None] * len(samples)
        refused: Counter[str] = Counter()
        chunks = chunks_of(samples)

        async def work() -> None:
            for places in chunks:
                files = await asyncio.to_thread(self._read, [samples[place].picture.path for place in places])
                refused.update(reason for reason in files if isinstance(reason, str))
                read = {place: data for place, data in zip(places, files, strict=True) if isinstance(data, bytes)}
                asked = {place: ask_for(data, samples[place].edits, samples[place].draw) for place, data in read.items()}
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
        taken, reasons = await self._embed({place: ask_for(data) for place, data in enumerate(files)}, vectors)
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
        return [read_picture(path, self._most_bytes) for path in paths]


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
            opened.append(OpenModel(model.label, rules, embedder))
            if rules not in pools:
                pools[rules] = copy_pool(rules, model.settings, seed)
                stack.push_async_callback(pools[rules].close)
                await pools[rules].start()
        yield Extractor(opened, pools, min(model.settings.max_object_bytes for model in models))


def copy_pool(rules: DecodeRules, settings: ModelSettings, seed: int) -> DecodePool:
    """Decode processes that take what `ask_for` makes; not started yet."""
    return DecodePool(
        rules,
        workers=settings.decode_workers,
        timeout_seconds=settings.decode_timeout_seconds * EDIT_TIME_FACTOR,
        memory_mib=settings.decode_memory_mib,
        renderer=CopyRenderer(seed),
    )


def chunks_of(samples: Sequence[Sample]) -> Iterator[list[int]]:
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


def read_picture(path: Path, most_bytes: int) -> bytes | str:
    """Its bytes, or the reason code of why there are none."""
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError:
        return ReasonCode.OBJECT_UNREADABLE.value
    return data if len(data) <= most_bytes else ReasonCode.OBJECT_TOO_LARGE.value
