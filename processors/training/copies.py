"""Copies of pictures, edited and prepared for a model in one go, inside a decode process: what DecodePool is given to run.

A copy is made from the picture as the product reads it, and read by the product like any other picture.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from PIL import Image

from processors.raster import DecodeRules, Raster, Refusal, render
from processors.training.edits import LEAST_SIDE, Edit, edited

MOST_SIDE: Final = 1024
"""A copy is made from a picture whose longer side is at most this long, so that an edit takes a bounded time."""

THUMBNAIL_SIDE: Final = 256

_SEPARATOR: Final = b"\0"


def ask_for(picture: bytes, edits: Sequence[Edit] = (), draw: int = 0) -> bytes:
    """What CopyRenderer takes: a picture, and the edits to make of it, one upon the other. Another `draw`: another copy."""
    return ",".join((str(draw), *edits)).encode() + _SEPARATOR + picture


@dataclass(frozen=True, slots=True)
class CopyRenderer:
    """A renderer for DecodePool. Takes what `ask_for` made; the copy depends on the seed and on that, and on nothing else."""

    seed: int

    def __call__(self, asked: bytes, rules: DecodeRules) -> Raster | Refusal:
        order, _, picture = asked.partition(_SEPARATOR)
        draw, *edits = order.decode().split(",")
        if not edits:
            return render(picture, rules)
        copy = open_whole(picture, rules)
        if isinstance(copy, Refusal):
            return copy
        identity = hashlib.sha256(picture).digest() + (b"" if draw == "0" else draw.encode())
        for edit in edits:
            copy = edited(copy, Edit(edit), seed=self.seed, identity=identity)
        buffer = io.BytesIO()
        # The quickest form without loss: it is read again at once.
        copy.save(buffer, "BMP")
        return render(buffer.getvalue(), rules)


def thumbnail(file: Path, edit: Edit | None, seed: int, rules: DecodeRules) -> Image.Image | None:
    """A picture or its copy, small, for people to look at; None when it cannot be read any more."""
    try:
        picture = file.read_bytes()
    except OSError:
        return None
    whole = open_whole(picture, rules)
    if isinstance(whole, Refusal):
        return None
    shown = edited(whole, edit, seed=seed, identity=hashlib.sha256(picture).digest()) if edit else whole
    shown.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return shown


def open_whole(picture: bytes, rules: DecodeRules) -> Image.Image | Refusal:
    """The whole picture, RGB, upright, on white, its longer side at most MOST_SIDE; read by the product's own code.

    Of `rules` only the limits count. Like `render`, not for several threads at once.
    """
    # Read twice, because only the first reading tells the upright size; a JPEG's is quick.
    small = render(picture, replace(rules, height=LEAST_SIDE, width=LEAST_SIDE))
    if isinstance(small, Refusal):
        return small
    scale = min(1.0, MOST_SIDE / max(small.width, small.height))
    width, height = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    whole = render(picture, replace(rules, height=height, width=width))
    return whole if isinstance(whole, Refusal) else Image.frombytes("RGB", (width, height), whole.rgb)
