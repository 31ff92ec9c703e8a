"""What lies beside fine-tuned weights, so that people know later what they have."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from processors.embedding.catalog import ModelDescription
from processors.training.measures import Measures
from processors.training.run_state import EpochResult, figure

CARD_FILE: Final = "MODEL_CARD.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """`in_the_way`: pictures that are right for nobody, among the held-out ones. `unreadable`: pictures. `refused`:
    samples of training, each as often as it was met.
    """

    parent: ModelDescription
    sha256: str
    size: int
    source: str
    training: int
    training_groups: int
    held_out: int
    in_the_way: int
    unreadable: Mapping[str, int]
    refused: Mapping[str, int]
    before: Measures
    best: EpochResult
    results: Sequence[EpochResult]
    training_settings: Mapping[str, object]
    use: Mapping[str, str]


def model_card(card: Card) -> str:
    """Markdown."""
    return "\n\n".join(
        (
            f"# {card.parent.network}, fine-tuned",
            _verdict(card),
            _rows(
                ("", ""),
                ("weights", f"sha256 `{card.sha256}`, {card.size / 1e6:.1f} MB"),
                ("parent", f"`{card.parent.name}`: {card.parent.weights.file_name}, sha256 `{card.parent.weights.sha256}`"),
                ("licence of the parent's weights", card.parent.weights.licence),
                ("vectors", f"{card.parent.dimension} floats, of {'×'.join(map(str, card.parent.input_size))} pixels"),
            ),
            "## Use",
            "```\n" + "\n".join(f"export {name}={shlex.quote(value)}" for name, value in card.use.items()) + "\n```",
            "## Pictures",
            _rows(
                ("", ""),
                ("from", f"`{card.source}`"),
                ("learned from", f"{card.training}, of {card.training_groups} groups"),
                ("held out", f"{card.held_out}, of groups that nothing was learned from"),
                ("among them, right for nobody", str(card.in_the_way)),
                ("left out", _counts(card.unreadable)),
                ("refused in training", _counts(card.refused)),
            ),
            "## Held-out pictures, before and after",
            _rows(
                ("", "before", f"after epoch {card.best.epoch}, kept"),
                *((f"recall@{k}", f"{card.before.recall_at[k]:.1%}", f"{share:.1%}") for k, share in _recalls(card)),
                (
                    "mAP",
                    f"{card.before.mean_average_precision:.3f}",
                    f"{card.best.measures.mean_average_precision:.3f}",
                ),
                ("queries", str(card.before.queries), str(card.best.measures.queries)),
            ),
            "The epoch was chosen by these very figures, so they flatter a little. Measure on pictures that had no part in it: "
            "`image-search evaluate`.",
            "## Epochs",
            _rows(
                ("epoch", "loss", "recall@1", "mAP"),
                *(
                    (
                        str(result.epoch),
                        f"{result.loss:.4f}",
                        f"{result.measures.recall_at[1]:.1%}",
                        f"{result.measures.mean_average_precision:.3f}",
                    )
                    for result in card.results
                ),
            ),
            "## Settings",
            _rows(("", ""), *((name, _text(value)) for name, value in card.training_settings.items())),
        )
    ) + "\n"  # fmt: skip


def _verdict(card: Card) -> str:
    before, after = card.before.recall_at[1], card.best.measures.recall_at[1]
    if card.best.better_by > figure(card.before):
        return f"Finds {after:.1%} of the held-out pictures first; its parent {before:.1%}."
    return f"**Not better than its parent**, which finds {before:.1%} of the held-out pictures first; this one {after:.1%}."


def _counts(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {code}" for code, count in refused.items()) or "none"


def _recalls(card: Card) -> list[tuple[int, float]]:
    return sorted(card.best.measures.recall_at.items())


def _rows(head: Sequence[str], *rows: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
