"""The network that learns, by itself: on each device and in each precision that this host has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from infra.errors import ConfigurationError
from processors.embedding.catalog import CATALOG
from processors.embedding.embedder import Pixels
from processors.embedding.weights import WeightFolders, obtain
from processors.training.losses import Objective, copy_objective
from processors.training.run_state import Progressed, read_run, write_run
from processors.training.trainer import Device, Hardware, Trainer, TrainingPrecision, hardware
from tests.pictures import draw

SIDE = 96
SMALL = replace(CATALOG["efficientnet_lite0"], input_size=(SIDE, SIDE))
GROUPS = [0, 0, 1, 1, 2, 2, 3, 3]
LEARNING_RATE = 3e-4
COSINE: Final = {"fp32": 1 - 1e-5, "bf16": 0.95}
"""To a processor's fp32. This network's vectors lose much in bf16, which is why services do not run it so."""

HARDWARE: Final[list[tuple[Device, TrainingPrecision]]] = [
    ("cpu", "fp32"),
    ("cpu", "bf16"),
    ("cuda", "fp32"),
    ("cuda", "bf16"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return obtain(SMALL, WeightFolders(own=None, downloads=tmp_path_factory.mktemp("weights")), print)


@pytest.fixture(scope="module")
def pictures() -> Pixels:
    """Four motifs, each of them plain and mirrored."""
    drawn = [np.asarray(draw(seed, (SIDE, SIDE))) for seed in range(4)]
    return np.stack([view for picture in drawn for view in (picture, picture[:, ::-1])])


@pytest.fixture(params=HARDWARE, ids="-".join)
def on(request: pytest.FixtureRequest) -> Hardware:
    try:
        return hardware(*request.param)
    except ConfigurationError as error:
        pytest.skip(str(error))


@asynccontextmanager
async def trainer_on(on: Hardware, weights: Path, objective: Objective | None = None) -> AsyncIterator[Trainer]:
    trainer = Trainer(SMALL, weights, on, objective or copy_objective(0.05, 5.0), threads=0)
    try:
        await trainer.start()
        yield trainer
    finally:
        trainer.close()


async def test_it_learns_and_keeps_its_weights_in_fp32(on: Hardware, weights: Path, pictures: Pixels) -> None:
    async with trainer_on(on, weights) as trainer, trainer_on(hardware("cpu", "fp32"), weights) as reference:
        vectors, expected = await trainer.embed(pictures), await reference.embed(pictures)
        assert vectors.dtype == np.float32
        cosines = np.sum(vectors * expected, axis=1)
        assert cosines.min() >= COSINE[on.precision]
        # Not fp32 under another name.
        assert on.precision == "fp32" or cosines.min() < COSINE["fp32"]
        losses = [await trainer.step(list(pictures), GROUPS, LEARNING_RATE) for _ in range(4)]
        assert losses[0] == pytest.approx(await reference.step(list(pictures), GROUPS, LEARNING_RATE), rel=0.05, abs=0.05)
        assert losses[-1] < losses[0]
        learned = await trainer.weights()
    kinds = {values.dtype for name, values in learned.items() if not name.endswith("num_batches_tracked")}
    assert kinds == {torch.float32} and {values.device.type for values in learned.values()} == {"cpu"}


async def test_one_that_goes_on_from_a_file_takes_the_same_next_step(
    on: Hardware, weights: Path, pictures: Pixels, tmp_path: Path
) -> None:
    async with trainer_on(on, weights) as first, trainer_on(on, weights) as second:
        for _ in range(2):
            await first.step(list(pictures), GROUPS, LEARNING_RATE)
        write_run(tmp_path, Progressed(asked="this"), await first.state())
        kept = read_run(tmp_path, "this")
        assert kept is not None
        await second.restore(kept[1])
        # The loss of the second step tells what the first one changed, by momenta that only the file had.
        for _ in range(2):
            one, other = [await trainer.step(list(pictures), GROUPS, LEARNING_RATE) for trainer in (first, second)]
            assert one == pytest.approx(other, rel=1e-3)


def no_number(vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return vectors.sum() * torch.nan


def no_memory(vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")


@pytest.mark.parametrize(("objective", "said"), [(no_number, "--learning-rate"), (no_memory, "--batch-size")])
async def test_a_step_that_fails_says_what_to_give_instead(
    weights: Path, pictures: Pixels, objective: Objective, said: str
) -> None:
    async with trainer_on(hardware("cpu", "fp32"), weights, objective) as trainer:
        before = await trainer.embed(pictures)
        with pytest.raises(ConfigurationError, match=said):
            await trainer.step(list(pictures), GROUPS, LEARNING_RATE)
        assert np.array_equal(await trainer.embed(pictures), before)
