"""What a training run keeps on the disk, so that one that was killed goes on where it was. Imports torch."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigurationError
from processors.training.measures import Measures

STATE_FILE: Final = "training.pt"

_READ_ERRORS: Final = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True)


class EpochResult(_Kept):
    """`epoch` is counted from 1. `loss`: mean of its steps. `measures`: of the held-out pictures after it."""

    epoch: int
    loss: float
    measures: Measures

    @property
    def better_by(self) -> tuple[float, float]:
        """What the best epoch is chosen by."""
        return figure(self.measures)


class Progressed(_Kept):
    """How far a run is. `asked`: what was asked of it, in one text: another question cannot go on from here.

    `epoch`, `step`: whole epochs done, and steps of the next one; `losses`: of these steps; `refused`: samples of training that
    could not be read, each as often as it was met. `best`: the result whose weights are kept, in `best_file`.
    """

    asked: str
    epoch: int = 0
    step: int = 0
    losses: tuple[float, ...] = ()
    refused: dict[str, int] = {}
    before: Measures | None = None
    results: tuple[EpochResult, ...] = ()
    best: EpochResult | None = None
    best_file: str = ""


def figure(measures: Measures) -> tuple[float, float]:
    """Recall@1; where that is equal, mean average precision."""
    return measures.recall_at[1], measures.mean_average_precision


def write_run(folder: Path, progressed: Progressed, trainer: dict[str, Any]) -> None:
    """Whole or not at all. Blocks."""
    partial = folder / f".{STATE_FILE}.partial"
    with partial.open("wb") as file:
        torch.save({"progressed": progressed.model_dump_json(), "trainer": trainer}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / STATE_FILE)


def read_run(folder: Path, asked: str) -> tuple[Progressed, dict[str, Any]] | None:
    """None for a run that has not begun. Raises ConfigurationError when what lies there is of another run. Blocks."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        # Only tensors and plain values, as for any file of weights.
        kept = torch.load(path, map_location="cpu", weights_only=True)
        progressed, trainer = Progressed.model_validate_json(kept["progressed"]), kept["trainer"]
    except (*_READ_ERRORS, ValidationError) as error:
        raise ConfigurationError(f"{path} cannot be read: remove it to begin anew") from error
    if progressed.asked != asked:
        raise ConfigurationError(
            f"{path} is of a run with other pictures or settings: give another --output, or remove it to begin anew"
        )
    return progressed, trainer
