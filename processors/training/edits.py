"""What people do to a picture before they pass it on, drawn by chance and yet the same every time.

An edited picture depends on the seed, the picture's identity and the edit, and on nothing else: not on the order or the
process in which edits are made. Evaluation makes its copies here, and training its pairs.

Imports Pillow and the standard library only: edits are made in decode processes (see raster.py).
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, TypeAlias

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

LEAST_SIDE: Final = 32
"""No edit makes a side smaller than this, unless it was smaller before."""

MOST_GROWTH: Final = 2
"""No edit makes a side longer than this many times the picture's longer side."""

_WHITE: Final = (255, 255, 255)
_WORDS: Final = (
    "when you see it", "wait for it", "found this today", "share if you agree", "not my picture", "SALE", "breaking news",
    "@somebody", "Monday again", "best day ever", "who did this?", "summer 2019", "for sale, ask me", "true story",
)  # fmt: skip

Colour: TypeAlias = tuple[int, int, int]


class Edit(StrEnum):
    """The kinds of edits. How far each goes is drawn anew for each picture."""

    CROP = "crop"
    RESIZE = "resize"
    JPEG = "jpeg"
    BLUR = "blur"
    OVERLAY = "overlay"
    TEXT = "text"
    FLIP = "flip"
    ROTATE = "rotate"
    COLOUR = "colour"
    SCREENSHOT = "screenshot"


def edited(picture: Image.Image, edit: Edit, *, seed: int, identity: bytes) -> Image.Image:
    """A new picture, RGB. `picture`: RGB, left as it is. `identity`: tells pictures apart, for example a content hash."""
    if picture.mode != "RGB":
        raise ValueError(f"expected a picture in RGB, got {picture.mode}")
    # Not hash(), which differs from process to process.
    draw = hashlib.sha256(b"\0".join((str(seed).encode(), edit.value.encode(), identity))).digest()
    # Not for secrets: the same numbers every time are the point.
    return _EDITS[edit](picture, random.Random(draw))  # noqa: S311


def _crop(picture: Image.Image, dice: random.Random) -> Image.Image:
    """40 to 85 % of the area, anywhere, of nearly the same form."""
    area, form = dice.uniform(0.4, 0.85), dice.uniform(0.85, 1.18)
    width = _least(picture.width * math.sqrt(area * form), picture.width)
    height = _least(picture.height * math.sqrt(area / form), picture.height)
    left, top = dice.randint(0, picture.width - width), dice.randint(0, picture.height - height)
    return picture.crop((left, top, left + width, top + height))


def _resize(picture: Image.Image, dice: random.Random) -> Image.Image:
    """20 to 70 % of each side, and a little squeezed."""
    scale, squeeze = dice.uniform(0.2, 0.7), dice.uniform(0.85, 1.18)
    width = _least(picture.width * scale * squeeze, picture.width)
    height = _least(picture.height * scale, picture.height)
    return picture.resize((width, height), dice.choice((Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)))


def _jpeg(picture: Image.Image, dice: random.Random) -> Image.Image:
    """Encoded again at quality 10 to 40, with the colours at half the resolution."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=dice.randint(10, 40), subsampling="4:2:0")
    with Image.open(buffer, formats=("JPEG",)) as encoded:
        return encoded.convert("RGB")


def _blur(picture: Image.Image, dice: random.Random) -> Image.Image:
    """As wide as 0.5 to 1.5 % of the longer side: small print cannot be read any more."""
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) * dice.uniform(0.005, 0.015)))


def _overlay(picture: Image.Image, dice: random.Random) -> Image.Image:
    """A sticker of two shapes over 8 to 25 % of the area, most of it not to be seen through."""
    side = math.sqrt(picture.width * picture.height * dice.uniform(0.08, 0.25))
    width, height = max(1, round(min(side, picture.width))), max(1, round(min(side, picture.height)))
    left, top = dice.randint(0, picture.width - width), dice.randint(0, picture.height - height)
    box = (left, top, left + width - 1, top + height - 1)
    layer = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(layer)
    opacity = dice.randint(160, 255)
    shape = dice.choice((draw.ellipse, draw.rectangle))
    shape(box, fill=(*_colour(dice), opacity))
    inner = (left + width // 4, top + height // 4, left + width * 3 // 4, top + height * 3 // 4)
    draw.ellipse(inner, fill=(*_colour(dice), opacity))
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _text(picture: Image.Image, dice: random.Random) -> Image.Image:
    """One to three lines, outlined, anywhere."""
    result = picture.copy()
    draw = ImageDraw.Draw(result)
    for _ in range(dice.randint(1, 3)):
        font = _font(max(8.0, min(picture.size) * dice.uniform(0.07, 0.14)))
        place = (dice.uniform(0, 0.5) * picture.width, dice.uniform(0, 0.9) * picture.height)
        draw.text(place, dice.choice(_WORDS), fill=_colour(dice), font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    return result


def _flip(picture: Image.Image, dice: random.Random) -> Image.Image:
    """Left and right exchanged: there is nothing to draw by chance."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _rotate(picture: Image.Image, dice: random.Random) -> Image.Image:
    """By 5 to 25 degrees either way with the corners filled, or, one time in four, by a quarter turn."""
    if dice.random() < 0.25:
        return picture.transpose(dice.choice((Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)))
    angle = dice.uniform(5, 25) * dice.choice((-1, 1))
    fill = dice.choice((_WHITE, (0, 0, 0)))
    return picture.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=fill)


def _colour_shift(picture: Image.Image, dice: random.Random) -> Image.Image:
    """Brightness, contrast, saturation and hue, each a little off; one time in five all colour is gone."""
    brighter = ImageEnhance.Brightness(picture).enhance(dice.uniform(0.6, 1.4))
    harder = ImageEnhance.Contrast(brighter).enhance(dice.uniform(0.6, 1.5))
    if dice.random() < 0.2:
        return harder.convert("L").convert("RGB")
    coloured = ImageEnhance.Color(harder).enhance(dice.uniform(0.4, 1.8))
    hue, saturation, value = coloured.convert("HSV").split()
    # Hue is an angle in 256 steps: 12 are 17 degrees.
    shift = dice.randint(-12, 12)
    turned = hue.point([(step + shift) % 256 for step in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _screenshot(picture: Image.Image, dice: random.Random) -> Image.Image:
    """As an application shows it: a title bar above, a caption and buttons below, margins at the sides."""
    dark = dice.random() < 0.5
    ground, ink = ((24, 26, 30), (225, 225, 225)) if dark else (_WHITE, (40, 40, 40))
    margin = round(picture.width * dice.uniform(0, 0.08))
    above, below = (max(8, round(picture.height * share)) for share in (dice.uniform(0.08, 0.2), dice.uniform(0.1, 0.25)))
    frame = Image.new("RGB", (picture.width + 2 * margin, picture.height + above + below), ground)
    frame.paste(picture, (margin, above))
    draw = ImageDraw.Draw(frame)
    draw.text((margin + 4, above * 0.25), dice.choice(_WORDS), fill=ink, font=_font(above * 0.45))
    top = above + picture.height
    draw.text((margin + 4, top + below * 0.1), dice.choice(_WORDS), fill=ink, font=_font(below * 0.3))
    size = below * 0.3
    for place in range(3):
        left = margin + 4 + place * size * 1.8
        draw.ellipse((left, top + below * 0.6, left + size, top + below * 0.6 + size), fill=_colour(dice))
    return frame


def _least(side: float, before: int) -> int:
    """A side shortened to `side`, but not below LEAST_SIDE; never longer than it was."""
    return min(before, max(LEAST_SIDE, round(side)))


def _colour(dice: random.Random) -> Colour:
    return dice.randrange(256), dice.randrange(256), dice.randrange(256)


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings along: the same on every machine."""
    return ImageFont.load_default(size=max(8.0, size))


_EDITS: Final[Mapping[Edit, Callable[[Image.Image, random.Random], Image.Image]]] = {
    Edit.CROP: _crop,
    Edit.RESIZE: _resize,
    Edit.JPEG: _jpeg,
    Edit.BLUR: _blur,
    Edit.OVERLAY: _overlay,
    Edit.TEXT: _text,
    Edit.FLIP: _flip,
    Edit.ROTATE: _rotate,
    Edit.COLOUR: _colour_shift,
    Edit.SCREENSHOT: _screenshot,
}
