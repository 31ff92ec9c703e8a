"""Makes the golden pictures and vectors in processors/embedding/golden/: `python -m tests.data.make_golden`.

The pictures are drawn here, so they are ours to give away. They are drawn only when they are not there: a drawn picture
need not come out the same with another version of Pillow, and the vectors must be of the very files that lie there. The
vectors come from the torch backend. Run it after a change of the decode rule or of a model's row, and look at the change:
it means that every collection has to be made anew.
"""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from infra.settings import ProcessorSettings
from processors.decode import decode
from processors.embedding import golden_check, open_embedder
from processors.embedding.catalog import find

FOLDER = Path(golden_check.__file__).parent / "golden"
MODELS = ("efficientnet_lite0",)
DIGITS = 7


def draw_hills(path: Path) -> None:
    """A landscape, 480 × 320, JPEG: soft colours, so that the JPEG decoder has something to do."""
    picture = Image.new("RGB", (480, 320))
    draw = ImageDraw.Draw(picture)
    for y in range(320):
        draw.line((0, y, 480, y), fill=(110 + y // 4, 150 + y // 5, 235 - y // 8))
    draw.ellipse((350, 40, 410, 100), fill=(255, 236, 170))
    for layer, colour in enumerate(((96, 132, 120), (70, 112, 78), (46, 84, 48))):
        ridge = [(x, 170 + 45 * layer + 26 * math.sin(x / (47 - 9 * layer) + layer * 2.1)) for x in range(0, 481, 4)]
        draw.polygon([(0, 320), *ridge, (480, 320)], fill=colour)
    dice = random.Random(7)
    for _ in range(70):
        x, y = dice.randrange(480), dice.randrange(262, 318)
        draw.polygon([(x, y - 22), (x - 7, y), (x + 7, y)], fill=(20, 50 + dice.randrange(40), 30))
    picture.filter(ImageFilter.GaussianBlur(0.8)).save(path, "JPEG", quality=88)


def draw_houses(path: Path) -> None:
    """A row of houses, 300 × 400, PNG with alpha: hard edges, and a sky that is transparent."""
    picture = Image.new("RGBA", (300, 400), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    dice = random.Random(11)
    draw.rectangle((0, 360, 300, 400), fill=(84, 84, 92, 255))
    for house, left in enumerate(range(5, 280, 74)):
        top = 150 + 30 * (house % 3)
        wall = (170 + 20 * (house % 4), 90 + 35 * house, 70 + 30 * (house % 2), 255)
        draw.rectangle((left, top, left + 66, 360), fill=wall)
        draw.polygon([(left - 4, top), (left + 33, top - 60), (left + 70, top)], fill=(120, 40, 36, 255))
        for window in range(6):
            x, y = left + 8 + 30 * (window % 2), top + 14 + 52 * (window // 2)
            draw.rectangle((x, y, x + 20, y + 32), fill=(245, 225, 140, 255) if dice.random() < 0.5 else (60, 74, 96, 255))
    picture.save(path, "PNG", optimize=True)


PICTURES = {"hills.jpg": draw_hills, "houses.png": draw_houses}


async def make() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        if not (FOLDER / name).exists():
            draw(FOLDER / name)
    for model in MODELS:
        await make_vectors(model)


async def make_vectors(model: str) -> None:
    settings = ProcessorSettings(model=model, model_backend="torch")
    description = find(model)
    embedder = await open_embedder(description, settings)
    try:
        rules = description.decode_rules(settings)
        pixels = np.stack([decode((FOLDER / name).read_bytes(), rules).pixels for name in PICTURES])
        vectors = await embedder.embed(pixels)
    finally:
        await embedder.close()
    golden = golden_check.GoldenVectors(
        fingerprint=embedder.fingerprint,
        vectors={
            name: [round(float(value), DIGITS) for value in vector] for name, vector in zip(PICTURES, vectors, strict=True)
        },
    )
    (FOLDER / f"{model}.json").write_text(golden.model_dump_json() + "\n")


if __name__ == "__main__":
    asyncio.run(make())
