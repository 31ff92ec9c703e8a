"""`make bench-gpu`: an NVIDIA GPU on ResNet50's shape, alone and with the decode pool feeding it."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, TypeVar

import numpy as np
import torch
from rich.table import Table

from infra.errors import ConfigurationError, ImageRejected
from infra.settings import ENV_PREFIX, ProcessorSettings
from processors.decode import Decoded, decode
from processors.decode_pool import DecodePool
from processors.embedding.catalog import ModelDescription, Precision
from processors.embedding.choice import chosen
from processors.embedding.cuda_backend import CudaEmbedder, pictures_that_fit
from processors.embedding.embedder import Embedder, Pixels
from processors.embedding.torch_backend import TorchEmbedder
from tests.benchmarks.models import settings_of
from tests.benchmarks.parts import Run
from tests.benchmarks.random_weights import resnet50_variables
from tests.benchmarks.report import machine
from tests.pictures import jpeg

PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "bf16")
BATCHES: Final = (1, 8, 32, 64, 128, 256, 512)
FED: Final = 64
"""Pictures decoded and embedded at once: a worker's full batch, by default."""

IN_FLIGHT: Final = 4

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class BatchRates:
    """Pictures a second, round by round. `resident`: pixels that are in the GPU's memory already."""

    precision: Precision
    batch: int
    resident: Sequence[float]
    pinned: Sequence[float]
    pageable: Sequence[float]


@dataclass(frozen=True, slots=True)
class FedRates:
    """Pictures a second, round by round. `decoded`, `embedded`: each alone; `together`: one feeding the other."""

    precision: Precision
    decoded: Sequence[float]
    embedded: Sequence[float]
    together: Sequence[float]


def batch_table(rates: Sequence[BatchRates], title: str) -> Table:
    table = Table("precision", "at once", "on the GPU already", "from pinned memory", "from pageable memory", title=title)
    for one in rates:
        table.add_row(one.precision, str(one.batch), *map(cell, (one.resident, one.pinned, one.pageable)))
    return table


def fed_table(rates: Sequence[FedRates], title: str) -> Table:
    table = Table("precision", "decode pool alone", "model alone", "together", "together over the slower", title=title)
    for one in rates:
        share = median(both / min(alone) for both, *alone in zip(one.together, one.decoded, one.embedded, strict=True))
        table.add_row(one.precision, *map(cell, (one.decoded, one.embedded, one.together)), f"{share:.2f}")
    return table


def cell(rounds: Sequence[float]) -> str:
    return f"{median(rounds):,.0f} ({min(rounds):,.0f} to {max(rounds):,.0f})"


def measure(run: Run) -> None:
    """Prints. No part of the other table: it has no goals, and few hosts have a GPU."""
    if not torch.cuda.is_available():
        run.say("torch finds no NVIDIA GPU here that it can use, so nothing was measured and there are no figures.")
        return
    with tempfile.TemporaryDirectory(prefix="image-search-bench-") as folder:
        asyncio.run(_measure(run, Path(folder)))


async def _measure(run: Run, folder: Path) -> None:
    variables = resnet50_variables(folder)
    weights = Path(variables[f"{ENV_PREFIX}OWN_WEIGHTS"])
    description = chosen(settings_of(variables, "fp32", folder))
    height, width = description.input_size
    pixels = np.random.default_rng(1).integers(0, 256, (max(BATCHES), height, width, 3), dtype=np.uint8)
    by_batch: list[BatchRates] = []
    fed: list[FedRates] = []
    for precision in PRECISIONS:
        try:
            embedder = await CudaEmbedder(description, precision, weights).start()
        except ConfigurationError as error:
            run.say(f"{precision} is left out: {error}")
            continue
        try:
            run.say(await _about(embedder, description, precision, weights))
            by_batch += [_rates(run, embedder, precision, pixels[:batch]) for batch in BATCHES]
            fed.append(await _fed(run, embedder, description, precision))
        finally:
            await embedder.close()
    hurried = "; a quick run: no figures to publish" if run.quick else ""
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}{hurried}"
    run.console.print(batch_table(by_batch, f"ResNet50's shape, pictures a second, median (least to most): {title}"))
    feeding = f"500×400 JPEGs, {FED} at once, {len(os.sched_getaffinity(0))} cores of {machine()['processor']}"
    run.console.print(fed_table(fed, f"Decoding and the model, pictures a second: {feeding}"))


async def _about(embedder: CudaEmbedder, description: ModelDescription, precision: Precision, weights: Path) -> str:
    """How close to the processor's vectors, and what of the GPU's memory a picture takes."""
    rules = description.decode_rules(ProcessorSettings())
    pictures = np.stack([decode(jpeg(number), rules).pixels for number in range(32)])
    reference = await TorchEmbedder(description, "fp32", weights).start()
    try:
        expected = await reference.embed(pictures)
    finally:
        await reference.close()
    cosine = float(np.min(np.sum(expected * await embedder.embed(pictures), axis=1)))
    free, each = embedder._free_bytes(), embedder._picture_bytes
    return (
        f"{precision}: least cosine to fp32 on the processor {cosine:.6f}, {len(pictures)} pictures; {each / 2**20:.1f} MiB a "
        f"picture, {free / 2**30:.1f} GiB free, so {pictures_that_fit(free, each)} at once"
    )


def _pixels(answers: Sequence[Decoded | ImageRejected]) -> Pixels:
    return np.stack([answer.pixels for answer in answers if not isinstance(answer, ImageRejected)])


def _rates(run: Run, embedder: CudaEmbedder, precision: Precision, pixels: Pixels) -> BatchRates:
    network, device = embedder._network, torch.device("cuda")
    resident = torch.from_numpy(pixels).to(device)
    sources: dict[str, Callable[[], torch.Tensor]] = {
        "resident": lambda: resident,
        "pinned": lambda: embedder._uploaded(pixels),
        "pageable": lambda: torch.from_numpy(pixels).to(device),
    }
    rounds: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(run.of(5, 2) + 1):
        for name in list(sources) if number % 2 else reversed(list(sources)):
            rate = _rate(network, sources[name], len(pixels), run.of(400, 100) / 1000)
            # The first round only warms up.
            if number:
                rounds[name].append(rate)
    return BatchRates(precision, len(pixels), **rounds)


def _rate(network: torch.nn.Module, source: Callable[[], torch.Tensor], batch: int, seconds: float) -> float:
    """Orders are given two batches ahead, as the embedder does, and no further: a queue without end would be measured late."""
    torch.cuda.synchronize()
    started, done = time.perf_counter(), 0
    before: torch.Tensor | None = None
    with torch.inference_mode():
        while time.perf_counter() - started < seconds:
            vectors = network(source())
            if before is not None:
                before.cpu()
            before, done = vectors, done + batch
    torch.cuda.synchronize()
    return done / (time.perf_counter() - started)


async def _fed(run: Run, embedder: Embedder, description: ModelDescription, precision: Precision) -> FedRates:
    batches = [[jpeg(number) for number in range(start, start + FED)] for start in range(0, run.of(16, 4) * FED, FED)]
    pool = DecodePool(description.decode_rules(ProcessorSettings()))
    decoded: list[float] = []
    embedded: list[float] = []
    together: list[float] = []
    await pool.start()
    try:
        pixels = [_pixels(await pool.decode(batches[0]))] * len(batches)
        for number in range(run.of(3, 1) + 1):
            rates = (
                await _all_done(batches, pool.decode),
                await _all_done(pixels, embedder.embed),
                await _all_done(batches, lambda batch: _decode_and_embed(pool, embedder, batch)),
            )
            # The first round only warms up.
            if number:
                for rounds, rate in zip((decoded, embedded, together), rates, strict=True):
                    rounds.append(rate)
    finally:
        await pool.close()
    return FedRates(precision, decoded, embedded, together)


async def _decode_and_embed(pool: DecodePool, embedder: Embedder, batch: Sequence[bytes]) -> None:
    await embedder.embed(_pixels(await pool.decode(batch)))


async def _all_done(batches: Sequence[Batch], work: Callable[[Batch], Awaitable[object]]) -> float:
    """Pictures a second, some batches in hand at a time, as in a worker."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def one(batch: Batch) -> None:
        async with places:
            await work(batch)

    started = time.perf_counter()
    await asyncio.gather(*(one(batch) for batch in batches))
    return FED * len(batches) / (time.perf_counter() - started)
