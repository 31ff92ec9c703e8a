"""Every kind of picture that people and attackers put into a bucket, made here byte by byte."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps

from infra.errors import ImageRejected
from processors.decode import Decoded, decode
from processors.raster import DRAFT_MARGIN, FORMATS, DecodeRules, RefusalCode
from schemas.events import ReasonCode
from tests.pictures import draw, encoded

RULES = DecodeRules(height=64, width=64, max_pixels=1_000_000, min_side=16)
RED, BLUE, WHITE = (220, 20, 30), (10, 30, 200), (255, 255, 255)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def refused(data: bytes, rules: DecodeRules = RULES) -> ReasonCode:
    with pytest.raises(ImageRejected) as caught:
        decode(data, rules)
    assert str(caught.value).startswith("The "), "our words, not a library's"
    return caught.value.reason


def colour(decoded: Decoded) -> tuple[int, ...]:
    """Mean colour of the middle, away from the filter's edges."""
    return tuple(round(float(value)) for value in decoded.pixels[24:40, 24:40].mean((0, 1)))


def close(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], within: float) -> bool:
    return float(np.abs(first.astype(int) - second.astype(int)).mean()) <= within


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_kind_that_is_taken_comes_out_alike(format_name: str) -> None:
    picture = draw(1, (200, 160))
    decoded = decode(encoded(picture, format_name), RULES)
    assert (decoded.format, decoded.width, decoded.height) == (format_name, 200, 160)
    assert decoded.pixels.shape == (64, 64, 3) and decoded.pixels.dtype == np.uint8
    reference = decode(encoded(picture, "PNG"), RULES)
    assert close(decoded.pixels, reference.pixels, within=6.0)


def test_the_middle_is_kept_and_the_shorter_side_fits() -> None:
    wide = Image.new("RGB", (300, 100), BLUE)
    wide.paste(RED, (100, 0, 200, 100))
    decoded = decode(encoded(wide, "PNG"), RULES)
    assert np.all(decoded.pixels[:, 2:-2] == RED)
    tall = decode(encoded(wide.transpose(Image.Transpose.ROTATE_90), "PNG"), DecodeRules(32, 64, 1_000_000, 16))
    assert tall.pixels.shape == (32, 64, 3) and np.all(tall.pixels == RED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["PNG", "JPEG"])
def test_exif_orientation_turns_the_picture_upright(orientation: int, format_name: str) -> None:
    stored = draw(2, (120, 80))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    decoded = decode(encoded(stored, format_name, exif=exif), RULES)
    marked = Image.open(io.BytesIO(encoded(stored, format_name, exif=exif)))
    upright = ImageOps.exif_transpose(marked)
    assert (decoded.width, decoded.height) == upright.size
    upright.info.clear()
    expected = decode(encoded(upright, "PNG", exif=b""), RULES)
    assert close(decoded.pixels, expected.pixels, within=0.5)
    if orientation != 1:
        assert not close(decoded.pixels, decode(encoded(stored, "PNG"), RULES).pixels, within=5.0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["PNG", "JPEG"])
def test_a_box_is_a_part_of_the_upright_picture(orientation: int, format_name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = encoded(draw(2, (240, 160)), format_name, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    box = (0.5, 0.25, 1.0, 0.75)
    decoded = decode(stored, replace(RULES, box=box))
    edges = [round(share * side) for share, side in zip(box, upright.size * 2, strict=True)]
    part = upright.crop((edges[0], edges[1], edges[2], edges[3]))
    part.info.clear()
    assert (decoded.width, decoded.height) == part.size
    assert close(decoded.pixels, decode(encoded(part, "PNG", exif=b""), RULES).pixels, within=0.5)


def test_a_box_that_holds_next_to_nothing_is_too_small() -> None:
    data = encoded(draw(2, (100, 100)), "PNG")
    assert refused(data, replace(RULES, box=(0.0, 0.0, 0.15, 1.0))) is ReasonCode.IMAGE_TOO_SMALL


def test_a_turned_picture_fills_an_input_that_is_not_square() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = draw(2, (160, 80))
    stored = encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    rules = DecodeRules(height=32, width=64, max_pixels=1_000_000, min_side=16)
    assert close(decode(stored, rules).pixels, decode(encoded(upright, "PNG"), rules).pixels, within=0.5)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"])
def test_broken_metadata_does_not_make_a_picture_unreadable(exif: bytes) -> None:
    picture = draw(3, (100, 80))
    assert close(decode(encoded(picture, exif=exif), RULES).pixels, decode(encoded(picture), RULES).pixels, within=0.0)


@pytest.mark.parametrize("value", [9, 0, 65535])
def test_an_unknown_orientation_is_as_stored(value: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    picture = draw(3, (100, 80))
    assert close(decode(encoded(picture, exif=exif), RULES).pixels, decode(encoded(picture), RULES).pixels, within=0.0)


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_hidden_colours_under_alpha_do_not_show(format_name: str) -> None:
    hidden = Image.new("RGBA", (80, 80), (*RED, 0))
    decoded = decode(
        encoded(hidden, format_name, **({"lossless": True, "exact": True} if format_name == "WEBP" else {})), RULES
    )
    assert np.all(decoded.pixels == 255)


def test_half_transparent_red_is_pink() -> None:
    assert colour(decode(encoded(Image.new("RGBA", (80, 80), (255, 0, 0, 128)), "PNG"), RULES)) == (255, 127, 127)


def test_grey_with_alpha() -> None:
    assert colour(decode(encoded(Image.new("LA", (80, 80), (0, 0)), "PNG"), RULES)) == WHITE
    assert colour(decode(encoded(Image.new("LA", (80, 80), (90, 255)), "PNG"), RULES)) == (90, 90, 90)


def test_palette_with_transparency() -> None:
    picture = Image.new("P", (80, 80), 1)
    picture.putpalette([*RED, *BLUE])
    assert colour(decode(encoded(picture, "PNG", transparency=0), RULES)) == BLUE
    assert colour(decode(encoded(picture, "PNG", transparency=1), RULES)) == WHITE
    assert colour(decode(encoded(picture, "PNG", transparency=bytes([255, 0])), RULES)) == WHITE
    assert colour(decode(encoded(picture, "GIF", transparency=1), RULES)) == WHITE


@pytest.mark.parametrize("mode", ["1", "L"])
def test_one_channel(mode: str) -> None:
    assert colour(decode(encoded(Image.new(mode, (80, 80), 255), "PNG"), RULES)) == WHITE
    assert colour(decode(encoded(Image.new(mode, (80, 80), 0), "PNG"), RULES)) == (0, 0, 0)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.repeat(np.linspace(0, 65535, 100).astype(">u2")[None, :], 100, axis=0)
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    decoded = decode(png(100, 100, 16, 0, rows), RULES)
    expected = np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[None, :], 100, axis=0)
    assert close(decoded.pixels, decode(encoded(Image.fromarray(expected), "PNG"), RULES).pixels, within=1.0)


@pytest.mark.parametrize(("colour_type", "values"), [(2, (52428, 26214, 13107)), (6, (52428, 26214, 13107, 65535))])
def test_sixteen_bit_colour(colour_type: int, values: tuple[int, ...]) -> None:
    rows = (b"\0" + struct.pack(f">{len(values)}H", *values) * 80) * 80
    assert colour(decode(png(80, 80, 16, colour_type, rows), RULES)) == (204, 102, 51)


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    rows = (b"\0" + b"\x80\x00" * 80) * 80
    data = png(80, 80, 16, 0, rows)
    position = data.index(b"IDAT") - 4
    assert colour(decode(data[:position] + chunk(b"tRNS", b"\xff\xff") + data[position:], RULES)) == (128, 128, 128)


def test_cmyk_jpeg() -> None:
    picture = Image.new("RGB", (96, 96), RED)
    decoded = decode(encoded(picture.convert("CMYK"), quality=95), RULES)
    assert close(decoded.pixels, decode(encoded(picture, "PNG"), RULES).pixels, within=3.0)


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "AVIF"])
def test_the_first_frame_of_an_animation(format_name: str) -> None:
    frames = [Image.new("RGB", (80, 80), shade) for shade in (RED, BLUE, WHITE)]
    decoded = decode(encoded(frames[0], format_name, save_all=True, append_images=frames[1:]), RULES)
    assert np.allclose(colour(decoded), RED, atol=8)


def test_several_pictures_in_one_jpeg_file_are_a_jpeg() -> None:
    frames = [draw(seed, (100, 80)) for seed in (1, 2)]
    decoded = decode(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]), RULES)
    assert decoded.format == "JPEG"
    assert close(decoded.pixels, decode(encoded(frames[0], "PNG"), RULES).pixels, within=6.0)


@pytest.mark.parametrize("size", [(641, 479), (1000, 640), (803, 1200)])
def test_a_jpeg_decoded_at_a_smaller_scale_looks_the_same(size: tuple[int, int]) -> None:
    data = encoded(draw(4, size), quality=92)
    assert min(size) >= 2 * DRAFT_MARGIN * RULES.width, "or the decoder would not scale"
    full = encoded(Image.open(io.BytesIO(data)), "PNG")
    assert close(decode(data, RULES).pixels, decode(full, RULES).pixels, within=1.5)


def test_a_large_jpeg_is_scaled_by_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def spy(image: ImageFile.ImageFile) -> object:
        loaded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spy)
    decoded = decode(encoded(draw(4, (1000, 640))), RULES)
    assert (decoded.width, decoded.height) == (1000, 640)
    assert loaded[0] == (250, 160)


def test_empty() -> None:
    assert refused(b"") is ReasonCode.EMPTY_OBJECT


@pytest.mark.parametrize("data", [b"just text, named .jpg\n", b"\0" * 400, b"BMW makes cars, this makes text", b"%PDF-1.7 ..."])
def test_no_picture_at_all(data: bytes) -> None:
    assert refused(data) is ReasonCode.NOT_AN_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
        encoded(Image.new("RGB", (80, 80)), "TIFF"),
        encoded(Image.new("RGB", (80, 80)), "JPEG2000"),
        encoded(Image.new("RGB", (80, 80)), "ICO"),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"8BPS\0\x01",
    ],
    ids=["SVG", "TIFF", "JPEG 2000", "ICO", "HEIF", "Photoshop"],
)
def test_pictures_of_a_kind_that_is_not_taken(data: bytes) -> None:
    assert refused(data) is ReasonCode.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("format_name", FORMATS)
def test_cut_off(format_name: str) -> None:
    whole = encoded(draw(5, (200, 160)), format_name)
    assert refused(whole[: len(whole) // 2]) is ReasonCode.CORRUPT_IMAGE
    assert refused(whole[:32]) is ReasonCode.CORRUPT_IMAGE


def test_a_jpeg_without_its_last_bytes_is_not_half_indexed() -> None:
    whole = encoded(draw(5, (200, 160)))
    assert refused(whole[:-200]) is ReasonCode.CORRUPT_IMAGE


def test_a_bomb_is_refused_by_its_header() -> None:
    assert refused(png(50_000, 50_000, 8, 2, b"\0")) is ReasonCode.TOO_MANY_PIXELS


def test_the_limit_is_ours_and_not_the_librarys() -> None:
    rules = DecodeRules(64, 64, max_pixels=200_000_000, min_side=16)
    assert refused(png(10_000, 10_000, 8, 2, b"\0"), rules) is ReasonCode.CORRUPT_IMAGE
    assert refused(png(20_000, 10_001, 8, 2, b"\0"), rules) is ReasonCode.TOO_MANY_PIXELS


@pytest.mark.parametrize("format_name", FORMATS)
def test_more_pixels_than_allowed(format_name: str) -> None:
    rules = DecodeRules(64, 64, max_pixels=99 * 100, min_side=16)
    assert refused(encoded(Image.new("RGB", (100, 100)), format_name), rules) is ReasonCode.TOO_MANY_PIXELS
    decode(encoded(Image.new("RGB", (99, 100)), format_name), rules)


@pytest.mark.parametrize("size", [(1, 1), (15, 500), (500, 15)])
def test_too_small(size: tuple[int, int]) -> None:
    assert refused(encoded(Image.new("RGB", size), "PNG")) is ReasonCode.IMAGE_TOO_SMALL


def test_the_least_size_is_taken() -> None:
    assert decode(encoded(Image.new("RGB", (16, 900), RED), "PNG"), RULES).pixels.shape == (64, 64, 3)


def test_warnings_of_the_decoder_stay_inside() -> None:
    picture = Image.new("P", (80, 80), 1)
    picture.putpalette([*RED, *BLUE])
    data = encoded(picture, "PNG", transparency=bytes([255, 128]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode(data, RULES)
        refused(png(2000, 2000, 8, 2, b"\0"), DecodeRules(64, 64, max_pixels=3_000_000, min_side=16))
    assert seen == []


def test_every_refusal_is_a_reason_code() -> None:
    assert {ReasonCode(code) for code in get_args(RefusalCode)} <= set(ReasonCode)


PICTURES = [encoded(draw(6, (40, 32)), format_name) for format_name in FORMATS]


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.binary(max_size=400), st.builds(lambda head, tail: head[:24] + tail, st.sampled_from(PICTURES), st.binary()))
)
@example(b"GIF89a")
@example(b"RIFF\0\0\0\0WEBP")
def test_any_bytes_are_decoded_or_rejected(data: bytes) -> None:
    answer_is_one_of_two(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PICTURES),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 10_000),
)
def test_damaged_pictures_are_decoded_or_rejected(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    answer_is_one_of_two(bytes(damaged[: len(damaged) - cut % 40]))


def answer_is_one_of_two(data: bytes) -> None:
    try:
        decoded = decode(data, RULES)
    except ImageRejected as rejected:
        assert rejected.reason in {ReasonCode(code) for code in get_args(RefusalCode)}
    else:
        assert decoded.pixels.shape == (64, 64, 3) and decoded.format in FORMATS
        assert min(decoded.width, decoded.height) >= RULES.min_side
