"""Pictures that the tests make themselves: distinct by seed, the same for the same seed."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def draw(seed: int, size: tuple[int, int] = (500, 400)) -> Image.Image:
    """Soft colours, some shapes and a little grain: about as hard to decode and as large as a photograph."""
    rng = np.random.default_rng(seed)
    ground = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    shapes = ImageDraw.Draw(ground)
    dice = random.Random(seed)
    for _ in range(12):
        left, top = dice.randrange(size[0]), dice.randrange(size[1])
        box = (left, top, left + dice.randrange(20, 180), top + dice.randrange(20, 180))
        colour = (dice.randrange(256), dice.randrange(256), dice.randrange(256))
        draw_one = dice.choice((shapes.ellipse, shapes.rectangle))
        draw_one(box, fill=colour)
    grain = rng.integers(-12, 13, (size[1], size[0], 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(ground, dtype=np.int16) + grain, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, format_name: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **({"quality": 85, **options} if format_name == "JPEG" else options))
    return buffer.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (500, 400)) -> bytes:
    return encoded(draw(seed, size))


def edited_copy(data: bytes) -> bytes:
    """Cropped, smaller, softer, and encoded again: what people find copies by."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    cropped = image.crop((width // 20, height // 20, width - width // 25, height - height // 30))
    smaller = cropped.resize((cropped.width * 3 // 4, cropped.height * 3 // 4), Image.Resampling.LANCZOS)
    return encoded(smaller.filter(ImageFilter.GaussianBlur(0.6)), quality=70)
