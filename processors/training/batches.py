"""Which pictures are learned from and which are held out, and in which order they come: drawn by the seed alone.

The batches of an epoch depend on seed and epoch, so a run that was killed goes on by leaving out what it had done.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pytorch_metric_learning.samplers import MPerClassSampler  # type: ignore[import-untyped]  # the package brings no types
from pytorch_metric_learning.utils import common_functions  # type: ignore[import-untyped]  # the package brings no types

from infra.errors import ConfigurationError
from processors.training.edits import Edit
from processors.training.extraction import Sample
from processors.training.labelled import LabelledPicture
from processors.training.ranking import NOBODY, GroundTruth

COPIES_EACH: Final = 4
"""Copies that are made of a held-out picture, to find it by."""

MOST_IN_THE_WAY: Final = 1000
"""Pictures that are right for nobody, among the held-out ones: they are embedded after every epoch."""

VIEWS: Final = 2
"""Copies of a picture in a batch that are a pair."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """`group`: what the picture shows, as a number; NOBODY: what no other does."""

    picture: LabelledPicture
    group: int


@dataclass(frozen=True, slots=True)
class Split:
    """`training` and `held_out` have no group in common. `in_the_way`: beside the held-out ones when recall is measured."""

    training: list[Numbered]
    held_out: list[Numbered]
    in_the_way: list[Numbered]


@dataclass(frozen=True, slots=True)
class Batching:
    """`edits`: kinds to draw from. `copies`: two copies of a picture are a pair; else pictures of a group are.
    `at_once`: most edits upon one another. `of_a_group`: pictures of each group in a batch."""

    seed: int
    copies: bool
    edits: tuple[Edit, ...]
    at_once: int
    batch_size: int
    of_a_group: int


@dataclass(frozen=True, slots=True)
class Batch:
    samples: list[Sample]
    groups: list[int]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What recall is measured on."""

    queries: list[Sample]
    query_groups: list[int]
    references: list[Sample]
    reference_groups: list[int]
    own: list[int]
    """Each query's own place among the references, or NOBODY."""

    def truth(self, kept_queries: Sequence[int], kept_references: Sequence[int]) -> GroundTruth:
        """Of those that could be read."""
        moved = {place: row for row, place in enumerate(kept_references)} | {NOBODY: NOBODY}
        return GroundTruth(
            query_groups=np.array([self.query_groups[place] for place in kept_queries], dtype=np.int64),
            reference_groups=np.array([self.reference_groups[place] for place in kept_references], dtype=np.int64),
            own=np.array([moved[self.own[place]] for place in kept_queries], dtype=np.int64),
        )


def split(pictures: Sequence[LabelledPicture], digests: Sequence[bytes], share: float, *, copies: bool, seed: int) -> Split:
    """The same bytes count once. Raises ConfigurationError when there is too little to learn from."""
    once = dict(reversed(list(zip(digests, pictures, strict=True))))
    contents = [once[digest] for digest in dict.fromkeys(digests)]
    numbered = [Numbered(picture, place) for place, picture in enumerate(contents)] if copies else _by_name(contents)
    members = Counter(one.group for one in numbered if one.group != NOBODY)
    groups = [group for group, count in members.items() if copies or count >= 2]
    held_out = _dice(seed, "held out").sample(groups, max(1, round(share * len(groups)))) if len(groups) >= 3 else []
    apart = set(held_out)
    training = [one for one in numbered if one.group in set(groups) - apart]
    if not apart or len({one.group for one in training}) < 2:
        what = "three pictures" if copies else "three groups of two pictures or more"
        raise ConfigurationError(f"there is too little to learn from: fine-tuning needs {what}, found {len(groups)}")
    others = training if copies else [one for one in numbered if one.group not in groups]
    if len(others) > MOST_IN_THE_WAY:
        others = _dice(seed, "in the way").sample(others, MOST_IN_THE_WAY)
    return Split(training, [one for one in numbered if one.group in apart], others)


def _by_name(pictures: Sequence[LabelledPicture]) -> list[Numbered]:
    names = {name: number for number, name in enumerate(sorted({picture.group for picture in pictures if picture.group}))}
    return [Numbered(picture, names.get(picture.group or "", NOBODY)) for picture in pictures]


def held_out_samples(apart: Split, by: Batching) -> HeldOut:
    """Copies shall find their originals, or pictures of a group each other."""
    references = [*apart.held_out, *apart.in_the_way]
    queries: list[Sample] = []
    own: list[int] = []
    query_groups: list[int] = []
    for place, one in enumerate(apart.held_out):
        if by.copies:
            dice = _dice(by.seed, f"copies of {place}")
            queries += [
                Sample(one.picture, tuple(dice.sample(by.edits, min(by.at_once, len(by.edits)))), draw=-1 - number)
                for number in range(COPIES_EACH)
            ]
        else:
            queries.append(Sample(one.picture))
        made = COPIES_EACH if by.copies else 1
        own += [NOBODY if by.copies else place] * made
        query_groups += [one.group] * made
    return HeldOut(
        queries=queries,
        query_groups=query_groups,
        references=[Sample(one.picture) for one in references],
        reference_groups=[one.group for one in references],
        own=own,
    )


def batches(training: Sequence[Numbered], by: Batching, epoch: int) -> list[Batch]:
    """All of one epoch, which is counted from 0."""
    chosen = _of_copies(training, by, epoch) if by.copies else _of_groups(training, by, epoch)
    dice = _dice(by.seed, f"edits of epoch {epoch}")
    made = []
    for part in chosen:
        samples = []
        for place, one in enumerate(part):
            # A picture of a group is as often as not taken as it is: so it is searched with later.
            plain = not by.copies and dice.random() < 0.5
            edits = () if plain else tuple(dice.sample(by.edits, dice.randint(1, min(by.at_once, len(by.edits)))))
            # Unlike any other draw of this picture, and never 0, which evaluation's copies have.
            samples.append(Sample(one.picture, edits, draw=1 + epoch * by.batch_size + place))
        made.append(Batch(samples, [one.group for one in part]))
    return made


def _of_copies(training: Sequence[Numbered], by: Batching, epoch: int) -> list[list[Numbered]]:
    order = _dice(by.seed, f"order of epoch {epoch}").sample(training, len(training))
    pictures = by.batch_size // VIEWS
    parts = [order[begin : begin + pictures] for begin in range(0, len(order), pictures)]
    # The rest would have few wrong pictures to be compared with; another epoch has another rest.
    whole = [part for part in parts if len(part) == pictures] or parts[:1]
    return [[one for one in part for _ in range(VIEWS)] for part in whole]


def _of_groups(training: Sequence[Numbered], by: Batching, epoch: int) -> list[list[Numbered]]:
    labels = np.array([one.group for one in training])
    size = min(by.batch_size // by.of_a_group, len(set(labels.tolist()))) * by.of_a_group
    draw = _dice(by.seed, f"order of epoch {epoch}").getrandbits(32)
    # The library draws from one generator for all; this is how it wants it to be seeded.
    before, common_functions.NUMPY_RANDOM = common_functions.NUMPY_RANDOM, np.random.RandomState(draw)
    try:
        order = list(MPerClassSampler(labels, by.of_a_group, size, length_before_new_iter=max(size, len(training))))
    finally:
        common_functions.NUMPY_RANDOM = before
    return [[training[place] for place in order[begin : begin + size]] for begin in range(0, len(order), size)]


def _dice(seed: int, purpose: str) -> random.Random:
    # Not for secrets: the same numbers every time are the point.
    return random.Random(f"{seed}, {purpose}")  # noqa: S311
