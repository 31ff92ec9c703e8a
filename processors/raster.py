"""Bytes of unknown origin to an RGB raster at the model's input size. This is what runs inside a decode process.

Imports Pillow and the standard library only: a decode process starts quickly, and the libraries that reserve address
space for each core (NumPy's OpenBLAS) do not count against its limit.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from PIL import AvifImagePlugin, ExifTags, Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

SCALING_RULE: Final = "jpeg-draft,exif,white,cover,bicubic/1"
"""Names and versions everything between bytes and pixels that changes a vector. Part of a model's fingerprint.

In order: a JPEG is decoded at 1/2, 1/4 or 1/8 where that is still DRAFT_MARGIN times the input size; 16-bit values are
scaled; the shorter side is scaled to the input size and the middle is kept, with an antialiased bicubic filter;
transparent pixels lie on white; EXIF orientation is applied. Raise the number when any of this changes.
"""

DRAFT_MARGIN: Final = 2
"""A JPEG is never decoded smaller than this many times the input size: closer, and copies of one picture in two sizes,
decoded at different scales, drift apart."""

# Imported by name, because Pillow imports all of its 44 plugins when one that it is told to use is missing.
FORMATS: Final = tuple(
    str(plugin.format) for plugin in (JpegImageFile, PngImageFile, WebPImageFile, GifImageFile, BmpImageFile, AvifImageFile)
)

RefusalCode: TypeAlias = Literal[
    "EMPTY_OBJECT", "NOT_AN_IMAGE", "UNSUPPORTED_FORMAT", "CORRUPT_IMAGE", "IMAGE_TOO_SMALL", "TOO_MANY_PIXELS"
]
"""The reason codes (schemas/events.py) that depend on the bytes alone."""

_WHITE: Final = (255, 255, 255)
_SIXTEEN_BIT_MODES: Final = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_TRANSPOSITIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what turns the stored picture upright. 1 and unknown values: as stored."""

_OWN_SIGNATURES: Final = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_FOREIGN_SIGNATURES: Final = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "Photoshop",
    b"%!PS": "PostScript",
    b"\0\0\1\0": "ICO",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
}
_HEIF_BRANDS: Final = frozenset({b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"})
_BMP_HEADER_SIZES: Final = frozenset({12, 40, 52, 56, 64, 108, 124})


@dataclass(frozen=True, slots=True)
class DecodeRules:
    """`height` and `width` are the model's input size; the limits hold for the picture as its header states it.

    `box`: left, top, right and bottom as shares of the upright picture, in [0, 1]: only that part is decoded to the input size.
    """

    height: int
    width: int
    max_pixels: int
    min_side: int
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Raster:
    """`rgb`: height × width × 3 bytes at the input size. `width`, `height`: of the original, as people see it upright."""

    rgb: bytes
    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why these bytes are no picture that we index. The message is for people and carries no library's text."""

    code: RefusalCode
    message: str


Renderer: TypeAlias = Callable[[bytes, DecodeRules], Raster | Refusal]


class _Refused(Exception):
    def __init__(self, code: RefusalCode, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(code, message)


def render_all(pictures: Sequence[bytes], rules: DecodeRules, renderer: Renderer) -> list[Raster | Refusal]:
    """The task of a decode process: several pictures, because a task of one costs half as much again."""
    return [renderer(picture, rules) for picture in pictures]


def render(data: bytes, rules: DecodeRules) -> Raster | Refusal:
    """Decode and scale. Whatever the bytes are, the answer is one of the two; the process's memory limit is the caller's.

    Sets Pillow's limits for the whole process and hides its warnings meanwhile: not for several threads at once.
    """
    # Held against the size that the header states, before anything is decoded.
    Image.MAX_IMAGE_PIXELS = rules.max_pixels
    # Each decoder thread reserves address space, and the pool has a process for each processor already.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _render(data, rules)
        except _Refused as refused:
            return refused.refusal
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            return Refusal("TOO_MANY_PIXELS", f"The picture has more than {rules.max_pixels:,} pixels.")
        except MemoryError:
            return Refusal("TOO_MANY_PIXELS", "The picture needs more memory than one picture may take.")
        except Exception:
            # Decoders raise what they like (OSError, SyntaxError, ValueError, struct.error, EOFError ...), and the same
            # bytes will raise it again.
            return _diagnosis(data)


def _render(data: bytes, rules: DecodeRules) -> Raster:
    if not data:
        raise _Refused("EMPTY_OBJECT", "The object is empty.")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        stored_width, stored_height = image.size
        if min(stored_width, stored_height) < rules.min_side:
            size = f"{stored_width} x {stored_height}"
            raise _Refused("IMAGE_TOO_SMALL", f"The picture is {size}; each side needs {rules.min_side} pixels.")
        orientation = _orientation(image)
        turned = orientation in (5, 6, 7, 8)
        if rules.box is not None:
            part = _part(image, orientation, rules.box, rules.min_side)
            return Raster(_scaled(part, (rules.width, rules.height)).tobytes(), part.width, part.height, str(image.format))
        target = (rules.height, rules.width) if turned else (rules.width, rules.height)
        upright = _scaled(image, target)
        if orientation in _TRANSPOSITIONS:
            upright = upright.transpose(_TRANSPOSITIONS[orientation])
        return Raster(
            rgb=upright.tobytes(),
            width=stored_height if turned else stored_width,
            height=stored_width if turned else stored_height,
            # An MPO file is a JPEG with more pictures behind the first: phones write it under .jpg.
            format="JPEG" if image.format == "MPO" else str(image.format),
        )


def _part(image: Image.Image, orientation: int, box: tuple[float, float, float, float], min_side: int) -> Image.Image:
    """What lies in the box, upright. The whole picture is decoded: a box is drawn on few pictures, and precisely."""
    upright = image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image
    left, top, right, bottom = (round(share * side) for share, side in zip(box, upright.size * 2, strict=True))
    if min(right - left, bottom - top) < min_side:
        raise _Refused("IMAGE_TOO_SMALL", f"The box is {right - left} x {bottom - top}; each side needs {min_side} pixels.")
    return upright.crop((left, top, right, bottom))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        # Broken metadata does not make a picture unreadable: viewers show it as stored.
        return 1
    return value if isinstance(value, int) else 1


def _scaled(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The middle of the picture at `target` (width, height), RGB on white, before EXIF orientation."""
    left, top, right, bottom = _draft(image, target)
    width, height = right - left, bottom - top
    kept_width = min(width, height * target[0] / target[1])
    kept_height = min(height, width * target[1] / target[0])
    left, top = left + (width - kept_width) / 2, top + (height - kept_height) / 2
    source = _eight_bit(image)
    # Scaled before it is laid on white: Pillow weighs colours by alpha here, and the large copy is spared.
    small = source.resize(target, Image.Resampling.BICUBIC, (left, top, left + kept_width, top + kept_height))
    if small.mode != "RGBA":
        return small.convert("RGB")
    ground = Image.new("RGB", target, _WHITE)
    ground.paste(small, mask=small.getchannel("A"))
    return ground


def _draft(image: Image.Image, target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Let the JPEG decoder scale. Returns the box of the decoded raster that holds the picture."""
    scale = DRAFT_MARGIN * max(target[0] / image.width, target[1] / image.height)
    least = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    drafted = image.draft("RGB", least)
    return drafted[1] if drafted is not None else (0, 0, image.width, image.height)


def _eight_bit(image: Image.Image) -> Image.Image:
    """L, RGB or RGBA, so that the filter works on colours and not on palette numbers."""
    if image.mode in _SIXTEEN_BIT_MODES:
        # convert() would clip at 255, which makes nearly every such picture white.
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _diagnosis(data: bytes) -> Refusal:
    """Why no decoder made a picture of it: damaged, of a kind that is not taken, or no picture at all."""
    head = data[:1024]
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    own = head.startswith(_OWN_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or brand in (b"avif", b"avis")
    if own or (head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES):
        return Refusal("CORRUPT_IMAGE", "The picture is damaged or cut off.")
    kind = next((kind for signature, kind in _FOREIGN_SIGNATURES.items() if head.startswith(signature)), None)
    if brand in _HEIF_BRANDS:
        kind = "HEIF"
    elif b"<svg" in head.lower():
        kind = "SVG"
    if kind is not None:
        return Refusal("UNSUPPORTED_FORMAT", f"The picture is {kind}, which is not taken. Taken are {', '.join(FORMATS)}.")
    return Refusal("NOT_AN_IMAGE", f"The object is no picture. Taken are {', '.join(FORMATS)}.")
