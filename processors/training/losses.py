"""What training makes smaller: how wrong a batch of vectors is about its groups. Imports torch."""

from __future__ import annotations

from typing import Final, Protocol

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, NTXentLoss  # type: ignore[import-untyped]  # brings no types
from pytorch_metric_learning.miners import MultiSimilarityMiner  # type: ignore[import-untyped]  # brings no types

LEAST_SQUARED_DISTANCE: Final = 1e-6
"""Nearer vectors count as this near: the logarithm of 0 and its gradient are not defined."""


class Objective(Protocol):
    """Unit vectors (n, dimension) and their groups (n) to one number. Vectors of one group shall be near."""

    def __call__(self, vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor: ...


def copy_objective(temperature: float, entropy_weight: float) -> Objective:
    """SSCD's: InfoNCE, in which all other pictures of the batch are wrong, and the entropy term.

    Pizzi, Roy, Ravindra, Goyal, Douze: A Self-Supervised Descriptor for Image Copy Detection, CVPR 2022.
    """
    contrast = NTXentLoss(temperature)

    def objective(vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = contrast(vectors, groups)
        return loss + entropy_weight * entropy_term(vectors, groups) if entropy_weight else loss

    return objective


def group_objective(entropy_weight: float) -> Objective:
    """The multi-similarity loss on the pairs that its miner finds hard; the entropy term, if it is asked for.

    Wang, Han, Huang, Dong, Scott: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning, CVPR 2019.
    """
    contrast, miner = MultiSimilarityLoss(), MultiSimilarityMiner()

    def objective(vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = contrast(vectors, groups, miner(vectors, groups))
        return loss + entropy_weight * entropy_term(vectors, groups) if entropy_weight else loss

    return objective


def entropy_term(vectors: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """−1/n · Σᵢ log( min over j of another group of ‖zᵢ − zⱼ‖ ): what is different is pushed apart, the nearest first.

    The estimator of Kozachenko and Leonenko of the vectors' entropy, up to a constant, as SSCD has it. 0 for one group.
    """
    others = groups[:, None] != groups[None, :]
    # Of unit vectors. From cosines: the derivative of a distance of 0 is not defined.
    squared = (2 - 2 * vectors @ vectors.T).clamp(min=LEAST_SQUARED_DISTANCE)
    nearest = squared.masked_fill(~others, torch.inf).amin(dim=1)[others.any(dim=1)]
    return -0.5 * nearest.log().mean() if len(nearest) else vectors.sum() * 0
