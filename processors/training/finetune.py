"""A model of the catalog, taught on one's own pictures: labelled ones, or any pictures and copies of them.

What it writes is a file of weights that `IMAGE_SEARCH_MODEL=own` loads, and a card of what it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from infra.errors import ConfigurationError, ImageRejected
from infra.progress import Progress
from processors.decode import Decoded
from processors.decode_pool import DecodePool
from processors.embedding.bucket_weights import bring_from_bucket
from processors.embedding.catalog import CATALOG, ModelDescription
from processors.embedding.checkpoint import write_safetensors
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.file_lock import locked
from processors.embedding.weights import WeightFolders, file_digest, obtain
from processors.training.batches import Batch, Batching, HeldOut, Split, batches, held_out_samples, split
from processors.training.copies import ask_for
from processors.training.edits import Edit
from processors.training.extraction import Extractor, ModelUnderTest, OpenModel, Sample, chunks_of, copy_pool, read_picture
from processors.training.labelled import LabelledPicture, labelled_pictures
from processors.training.losses import copy_objective, group_objective
from processors.training.measures import Measures, measure
from processors.training.model_card import CARD_FILE, Card, model_card
from processors.training.ranking import rank_all
from processors.training.run_state import EpochResult, Progressed, figure, read_run, write_run
from processors.training.trainer import Device, Hardware, Trainer, TrainingPrecision, hardware, rate_at

WEIGHTS_FILE: Final = "finetuned.safetensors"

BATCHES_AHEAD: Final = 2
"""Decoded while another one is learned from."""

TRAINABLE: Final = ("efficientnet_lite0", "resnet50", "gl18_resnet50")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """What is asked. `edits` and `copies`: see Batching. `checkpoint_steps`: steps between two looks at the disk."""

    source: Path
    model: ModelUnderTest
    output: Path
    copies: bool
    edits: tuple[Edit, ...]
    at_once: int = 2
    held_out: float = 0.2
    epochs: int = 10
    batch_size: int = 32
    of_a_group: int = 2
    learning_rate: float = 1e-4
    temperature: float = 0.05
    entropy_weight: float = 5.0
    seed: int = 1
    checkpoint_steps: int = 50
    device: Device = "auto"
    precision: TrainingPrecision = "auto"


@dataclass(frozen=True, slots=True)
class FineTuned:
    """`settings`: environment variables that the weights are used by."""

    weights: Path
    sha256: str
    card: Path
    before: Measures
    best: EpochResult
    settings: dict[str, str]

    @property
    def better(self) -> bool:
        return self.best.better_by > figure(self.before)


async def finetune(asked: FineTuning, progress: Progress, say: Callable[[str], None]) -> FineTuned:
    """Begins, or goes on where an earlier run with the same output was ended. Raises ConfigurationError."""
    description, settings = asked.model.description, asked.model.settings
    if description.network not in TRAINABLE:
        raise ConfigurationError(
            f"{description.name} is a program, which cannot be trained: choose one of {', '.join(TRAINABLE)}"
        )
    on = hardware(asked.device, asked.precision)
    pictures = await asyncio.to_thread(labelled_pictures, asked.source)
    await bring_from_bucket(description, settings, say)
    weights = await asyncio.to_thread(obtain, description, WeightFolders.from_settings(settings), say)
    objective = (
        copy_objective(asked.temperature, asked.entropy_weight) if asked.copies else group_objective(asked.entropy_weight)
    )
    async with AsyncExitStack() as stack:
        asked.output.mkdir(parents=True, exist_ok=True)
        # Two runs into one folder would take each other's files.
        stack.enter_context(locked(asked.output / ".lock"))
        # Ended after the pool: its thread may be in the middle of a step.
        trainer = Trainer(description, weights, on, objective, settings.model_threads)
        stack.callback(trainer.close)
        rules = description.decode_rules(settings)
        pool = copy_pool(rules, settings, asked.seed)
        stack.push_async_callback(pool.close)
        await pool.start()
        reader = Extractor([OpenModel("pictures", rules, _NoVectors())], {rules: pool}, settings.max_object_bytes)
        found = await reader.extract([Sample(picture) for picture in pictures], progress("reading pictures", len(pictures)))
        readable = [pictures[place] for place in found.kept]
        apart = split(readable, found.digests, asked.held_out, copies=asked.copies, seed=asked.seed)
        await trainer.start()
        run = _Run(asked=asked, apart=apart, on=on, trainer=trainer, pool=pool, progress=progress, say=say)
        await run.begin(_question(asked, on, readable, found.digests))
        await run.train()
        return await run.finish(found.refused)


def _epoch_file(epoch: object) -> str:
    return f"epoch-{epoch}.safetensors"


class _NoVectors:
    """Whoever only asks which pictures can be read."""

    dimension = 0

    async def embed(self, pixels: Pixels) -> Vectors:
        return np.zeros((len(pixels), 0), dtype=np.float32)


class _Run:
    def __init__(
        self,
        *,
        asked: FineTuning,
        apart: Split,
        on: Hardware,
        trainer: Trainer,
        pool: DecodePool,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._asked = asked
        self._apart = apart
        self._on = on
        self._trainer = trainer
        self._pool = pool
        self._progress = progress
        self._say = say
        self._by = Batching(asked.seed, asked.copies, asked.edits, asked.at_once, asked.batch_size, asked.of_a_group)
        self._held_out = held_out_samples(apart, self._by)
        rules = asked.model.description.decode_rules(asked.model.settings)
        self._most_bytes = asked.model.settings.max_object_bytes
        self._extractor = Extractor([OpenModel("network", rules, trainer)], {rules: pool}, self._most_bytes)

    async def begin(self, question: str) -> None:
        kept = await asyncio.to_thread(read_run, self._asked.output, question)
        if kept is None:
            before = await self._measure("held-out pictures before")
            self._now = Progressed(asked=question, before=before)
            await self._keep()
            self._say(f"before: {_figures(before)}")
            return
        self._now, state = kept
        await self._trainer.restore(state)
        if self._now.epoch < self._asked.epochs:
            self._say(f"going on from epoch {self._now.epoch + 1}, step {self._now.step + 1}")
        else:
            self._say("all epochs were done before")

    async def train(self) -> None:
        for epoch in range(self._now.epoch, self._asked.epochs):
            await self._epoch(epoch)

    async def finish(self, unreadable: Mapping[str, int]) -> FineTuned:
        now, asked = self._now, self._asked
        assert now.before is not None and now.best is not None
        path = asked.output / WEIGHTS_FILE
        kept = asked.output / now.best_file
        if kept != path:
            # The state names the file before it has that name: killed in between, the next run finds it under either.
            if kept.is_file():
                kept.replace(path)
            elif not path.is_file():
                raise ConfigurationError(f"{kept} is gone: remove training.pt beside it to begin anew")
        # One that was killed after it had written a better epoch's weights had no time to remove the ones before.
        for left_over in asked.output.glob(_epoch_file("*")):
            left_over.unlink()
        sha256 = await asyncio.to_thread(file_digest, path)
        use = _settings(asked.model.description, path, sha256)
        card = Card(
            parent=asked.model.description,
            sha256=sha256,
            size=path.stat().st_size,
            source=str(asked.source),
            training=len(self._apart.training),
            training_groups=len({one.group for one in self._apart.training}),
            held_out=len(self._apart.held_out),
            in_the_way=len(self._apart.in_the_way),
            unreadable=dict(sorted(unreadable.items())),
            refused=dict(sorted(now.refused.items())),
            before=now.before,
            best=now.best,
            results=now.results,
            training_settings={**_choices(asked), "device": self._on.device, "precision": self._on.precision},
            use=use,
        )
        beside = asked.output / CARD_FILE
        beside.write_text(model_card(card), encoding="utf-8")
        return FineTuned(path, sha256, beside, now.before, now.best, use)

    async def _epoch(self, epoch: int) -> None:
        asked = self._asked
        plan = batches(self._apart.training, self._by, epoch)
        begun = self._now.step
        advance = self._progress(f"epoch {epoch + 1} of {asked.epochs}", len(plan))
        advance(begun)
        losses = list(self._now.losses)
        refused = Counter(self._now.refused)
        async with aclosing(self._decoded(plan[begun:])) as decoded:
            number = begun
            async for pixels, groups, reasons in decoded:
                refused.update(reasons)
                # A batch whose other pictures are gone has nothing to be told apart.
                if len(set(groups)) > 1:
                    rate = rate_at(epoch * len(plan) + number, asked.epochs * len(plan), asked.learning_rate)
                    losses.append(await self._trainer.step(pixels, groups, rate))
                number += 1
                advance(1)
                self._now = self._now.model_copy(update={"step": number, "losses": tuple(losses), "refused": dict(refused)})
                if number % asked.checkpoint_steps == 0:
                    await self._keep()
        await self._end_epoch(epoch, losses)

    async def _end_epoch(self, epoch: int, losses: list[float]) -> None:
        if not losses:
            raise ConfigurationError(f"{self._asked.source}: none of the pictures can be read")
        measures = await self._measure(f"held-out pictures after epoch {epoch + 1}")
        result = EpochResult(epoch=epoch + 1, loss=sum(losses) / len(losses), measures=measures)
        self._say(f"epoch {result.epoch}: loss {result.loss:.4f}, {_figures(measures)}")
        before = self._now
        changed: dict[str, object] = {
            "epoch": epoch + 1, "step": 0, "losses": (), "results": (*before.results, result)
        }  # fmt: skip
        if before.best is None or result.better_by > before.best.better_by:
            # Under a name of its own until the state names it: killed in between, the file that the state names is still there.
            name = _epoch_file(epoch + 1)
            remarks = {"format": "pt", "parent": self._asked.model.description.weights.sha256, "epoch": str(epoch + 1)}
            state = await self._trainer.weights()
            await asyncio.to_thread(write_safetensors, self._asked.output / name, state, remarks)
            changed |= {"best": result, "best_file": name}
        self._now = before.model_copy(update=changed)
        await self._keep()
        if before.best_file and before.best_file != self._now.best_file:
            (self._asked.output / before.best_file).unlink(missing_ok=True)

    async def _keep(self) -> None:
        await asyncio.to_thread(write_run, self._asked.output, self._now, await self._trainer.state())

    async def _measure(self, what: str) -> Measures:
        held_out: HeldOut = self._held_out
        advance = self._progress(what, len(held_out.queries) + len(held_out.references))
        references = await self._extractor.extract(held_out.references, advance)
        queries = await self._extractor.extract(held_out.queries, advance)
        truth = held_out.truth(queries.kept, references.kept)
        ranking = await asyncio.to_thread(rank_all, queries.vectors["network"], references.vectors["network"], truth)
        try:
            return measure(ranking)
        except ValueError:
            raise ConfigurationError(f"{self._asked.source}: none of the held-out pictures can be read") from None

    async def _decoded(self, plan: Sequence[Batch]) -> AsyncGenerator[tuple[list[Pixels], list[int], list[str]]]:
        """Of each batch what can be read, in order, some of them ahead."""
        ahead: list[asyncio.Task[tuple[list[Pixels], list[int], list[str]]]] = []
        try:
            for batch in plan:
                ahead.append(asyncio.create_task(self._decode(batch)))
                if len(ahead) > BATCHES_AHEAD:
                    yield await ahead.pop(0)
            while ahead:
                yield await ahead.pop(0)
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _decode(self, batch: Batch) -> tuple[list[Pixels], list[int], list[str]]:
        pixels: list[Pixels] = []
        groups: list[int] = []
        reasons: list[str] = []
        for places in chunks_of(batch.samples):
            chosen = [batch.samples[place] for place in places]
            files = await asyncio.to_thread(self._read, chosen)
            reasons += [reason for reason in files if isinstance(reason, str)]
            read = [(place, data) for place, data in zip(places, files, strict=True) if isinstance(data, bytes)]
            asked = [ask_for(data, batch.samples[place].edits, batch.samples[place].draw) for place, data in read]
            for (place, _), outcome in zip(read, await self._pool.decode(asked), strict=True):
                match outcome:
                    case Decoded():
                        pixels.append(outcome.pixels)
                        groups.append(batch.groups[place])
                    case ImageRejected():
                        reasons.append(outcome.reason.value)
        return pixels, groups, reasons

    def _read(self, samples: Sequence[Sample]) -> list[bytes | str]:
        return [read_picture(sample.picture.path, self._most_bytes) for sample in samples]


def _choices(asked: FineTuning) -> dict[str, object]:
    """All of what is asked that changes what is learned, and no more."""
    of_pairs: dict[str, object] = {"temperature": asked.temperature} if asked.copies else {"of a group": asked.of_a_group}
    return {
        "pairs": "two copies of a picture" if asked.copies else "pictures of a group",
        **of_pairs,
        "edits": [str(edit) for edit in asked.edits],
        "edits at once": asked.at_once,
        "held out": asked.held_out,
        "epochs": asked.epochs,
        "batch size": asked.batch_size,
        "learning rate": asked.learning_rate,
        "entropy weight": asked.entropy_weight,
        "seed": asked.seed,
    }


def _question(asked: FineTuning, on: Hardware, pictures: Sequence[LabelledPicture], digests: Sequence[bytes]) -> str:
    """In one text, so that two runs can be compared. Where the pictures lie is no part of it, nor where it runs."""
    content = hashlib.sha256()
    for picture, digest in zip(pictures, digests, strict=True):
        content.update(f"{digest.hex()} {picture.group or ''}\n".encode())
    parts = {
        **_choices(asked),
        "precision": on.precision,
        "parent": asdict(asked.model.description),
        "pictures": content.hexdigest(),
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _settings(parent: ModelDescription, weights: Path, sha256: str) -> dict[str, str]:
    """What the services must be told to use these weights; what the network's row in the catalog says is left out."""
    row = CATALOG[parent.network]
    use = {
        "IMAGE_SEARCH_MODEL": "own",
        "IMAGE_SEARCH_OWN_WEIGHTS": str(weights.absolute()),
        "IMAGE_SEARCH_OWN_FORMAT": "safetensors",
        "IMAGE_SEARCH_OWN_NETWORK": parent.network,
        "IMAGE_SEARCH_WEIGHTS_SHA256": sha256,
        # One that was fitted before was fitted for other weights.
        "IMAGE_SEARCH_PROJECTION": "",
        "IMAGE_SEARCH_PROJECTION_SHA256": "",
        "IMAGE_SEARCH_PROJECTION_DIMENSION": "0",
    }
    if parent.dimension != row.dimension:
        use["IMAGE_SEARCH_OWN_DIMENSION"] = str(parent.dimension)
    if parent.input_size != row.input_size:
        use["IMAGE_SEARCH_OWN_INPUT_PIXELS"] = str(parent.input_size[0])
    if parent.mean != row.mean:
        use["IMAGE_SEARCH_OWN_MEAN"] = ",".join(map(str, parent.mean))
    if parent.deviation != row.deviation:
        use["IMAGE_SEARCH_OWN_DEVIATION"] = ",".join(map(str, parent.deviation))
    return use


def _figures(measures: Measures) -> str:
    return f"recall@1 {measures.recall_at[1]:.1%}, mAP {measures.mean_average_precision:.3f}"
