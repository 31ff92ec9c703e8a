"""Edits: the same every time, of bounded size, and each does something."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from processors.raster import DecodeRules, Raster, Refusal, render
from processors.training.commands import EDITS
from processors.training.copies import MOST_SIDE, CopyRenderer, ask_for, open_whole, thumbnail
from processors.training.edits import LEAST_SIDE, MOST_GROWTH, Edit, edited
from tests.pictures import draw, encoded, jpeg

RULES = DecodeRules(height=64, width=64, max_pixels=50_000_000, min_side=16)
PICTURE = draw(3, (240, 180))
SIDES = st.integers(16, 300)


@given(edit=st.sampled_from(Edit), width=SIDES, height=SIDES, seed=st.integers(), identity=st.binary(max_size=8))
@settings(max_examples=150, deadline=None)
def test_any_picture_gives_the_same_rgb_of_bounded_size_twice(
    edit: Edit, width: int, height: int, seed: int, identity: bytes
) -> None:
    picture = draw(width, (width, height))
    before = picture.tobytes()
    first, second = (edited(picture, edit, seed=seed, identity=identity) for _ in range(2))
    assert first.mode == "RGB" and first.size == second.size and first.tobytes() == second.tobytes()
    assert picture.tobytes() == before, "an edit leaves its picture as it is"
    assert min(first.size) >= min(LEAST_SIDE, *picture.size)
    assert max(first.size) <= MOST_GROWTH * max(picture.size)


@pytest.mark.parametrize("edit", Edit)
def test_seed_and_identity_are_drawn_from(edit: Edit) -> None:
    made = {edited(PICTURE, edit, seed=seed, identity=bytes([place])).tobytes() for seed in range(4) for place in range(4)}
    # A flip has nothing to draw.
    assert len(made) == 1 if edit is Edit.FLIP else len(made) >= 12
    assert PICTURE.tobytes() not in made


def test_neither_order_nor_other_random_numbers_change_an_edit() -> None:
    forth = {edit: edited(PICTURE, edit, seed=1, identity=b"a").tobytes() for edit in Edit}
    random.seed(99)
    assert {edit: edited(PICTURE, edit, seed=1, identity=b"a").tobytes() for edit in reversed(Edit)} == forth


def test_another_process_makes_the_same_copies() -> None:
    """Strings hash differently there."""
    program = (
        "import hashlib, sys; from PIL import Image; from processors.training.edits import Edit, edited\n"
        "picture = Image.frombytes('RGB', (240, 180), sys.stdin.buffer.read())\n"
        "made = b''.join(edited(picture, edit, seed=5, identity=b'x').tobytes() for edit in Edit)\n"
        "print(hashlib.sha256(made).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", program], input=PICTURE.tobytes(), capture_output=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_only_rgb_is_taken() -> None:
    with pytest.raises(ValueError, match="RGB"):
        edited(Image.new("L", (40, 40)), Edit.CROP, seed=1, identity=b"")


def test_the_command_names_every_edit() -> None:
    assert tuple(Edit) == EDITS


def test_without_an_edit_a_picture_goes_the_products_way() -> None:
    data = jpeg(1)
    assert CopyRenderer(seed=1)(ask_for(data), RULES) == render(data, RULES)


@pytest.mark.parametrize("edit", Edit)
def test_a_copy_depends_on_seed_bytes_and_edit(edit: Edit) -> None:
    first, again = (CopyRenderer(seed=1)(ask_for(jpeg(1), (edit,)), RULES) for _ in range(2))
    assert isinstance(first, Raster) and first == again
    assert len(first.rgb) == RULES.height * RULES.width * 3
    other = CopyRenderer(seed=1)(ask_for(jpeg(2), (edit,)), RULES)
    assert isinstance(other, Raster) and other.rgb != first.rgb


@pytest.mark.parametrize("edit", [None, *Edit])
def test_what_is_no_picture_is_refused_edited_or_not(edit: Edit | None) -> None:
    for data, code in ((b"no picture", "NOT_AN_IMAGE"), (jpeg(1)[:500], "CORRUPT_IMAGE"), (b"", "EMPTY_OBJECT")):
        outcome = CopyRenderer(seed=1)(ask_for(data, (edit,) if edit else ()), RULES)
        assert isinstance(outcome, Refusal) and outcome.code == code


def test_a_picture_is_opened_whole_upright_and_not_too_large() -> None:
    wide = draw(4, (1500, 600))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    wide.save(buffer, "JPEG", exif=exif)
    opened = open_whole(buffer.getvalue(), RULES)
    assert isinstance(opened, Image.Image)
    assert opened.mode == "RGB" and opened.height == MOST_SIDE and opened.width == round(600 * MOST_SIDE / 1500)


def test_a_small_picture_keeps_its_pixels() -> None:
    opened = open_whole(encoded(PICTURE, "PNG"), RULES)
    assert isinstance(opened, Image.Image)
    assert opened.size == PICTURE.size and opened.tobytes() == PICTURE.tobytes()


def test_thumbnails_are_small_or_missing(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "a.jpg").write_bytes(jpeg(1))
    (folder / "b.jpg").write_bytes(b"no picture")
    for edit in (None, Edit.FLIP):
        small = thumbnail(folder / "a.jpg", edit, 1, RULES)
        assert small is not None and max(small.size) == 256
    assert thumbnail(folder / "b.jpg", None, 1, RULES) is None
    assert thumbnail(folder / "gone.jpg", None, 1, RULES) is None
