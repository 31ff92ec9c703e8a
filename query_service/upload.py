"""Taking in a picture from a client who may mean ill: everything is counted and timed while it streams in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, hdrs, web
from aiohttp.http import HttpProcessingError

from query_service.admission import Ticket
from query_service.errors import RequestRefused
from schemas.api import ErrorCode

FILE_FIELDS = ("file", "image")
RAW_TYPES = "image/*, application/octet-stream"

_CHUNK_BYTES = 64 * 1024
_MOST_PARTS = 16
_LONGEST_FIELD_BYTES = 8 * 1024
_MULTIPART_OVERHEAD_BYTES = 256 * 1024
"""Boundaries, part headers and fields, above the picture itself."""


@dataclass(frozen=True, slots=True)
class Upload:
    """`fields` are the other fields of a multipart form, in their order."""

    picture: bytes
    fields: list[tuple[str, str]] = field(default_factory=list)


async def read_upload(request: web.Request, ticket: Ticket, *, max_bytes: int, timeout_seconds: float) -> Upload:
    """The picture of a multipart form (field `file` or `image`) or of a raw body.

    Raises RequestRefused: MISSING_IMAGE, INVALID_BODY, BODY_TIMEOUT, BODY_TOO_LARGE, UNSUPPORTED_MEDIA_TYPE,
    UNSUPPORTED_CONTENT_ENCODING, TOO_MANY_REQUESTS.
    """
    is_form = request.content_type == "multipart/form-data"
    _check_headers(request, is_form, max_bytes)
    try:
        async with asyncio.timeout(timeout_seconds):
            if is_form:
                return await _read_form(request, ticket, max_bytes)
            return Upload(await _read_raw(request, ticket, max_bytes))
    except TimeoutError:
        raise _too_slow(timeout_seconds) from None
    except (ValueError, AssertionError, HttpProcessingError, web.RequestPayloadError):
        raise RequestRefused(ErrorCode.INVALID_BODY, "The body is not well formed for its Content-Type.") from None


async def body_chunks(request: web.Request, *, timeout_seconds: float) -> AsyncGenerator[bytes]:
    """The raw body as it comes. Raises RequestRefused: BODY_TIMEOUT, INVALID_BODY."""
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    while True:
        try:
            # Around each chunk, not around the loop: the time-out must not strike while another awaits in between.
            async with asyncio.timeout_at(deadline):
                chunk = await request.content.readany()
        except TimeoutError:
            raise _too_slow(timeout_seconds) from None
        except (HttpProcessingError, web.RequestPayloadError):
            raise RequestRefused(ErrorCode.INVALID_BODY, "The body broke off.") from None
        if not chunk:
            return
        yield chunk


def check_raw(request: web.Request, *, max_bytes: int) -> int:
    """How long the raw body will be. Raises RequestRefused for one that is not taken, before any of it is read."""
    _check_headers(request, False, max_bytes)
    if request.content_length is None:
        raise RequestRefused(ErrorCode.LENGTH_REQUIRED, "Send the picture with its Content-Length, not in chunks.")
    if request.content_length == 0:
        raise _missing()
    return request.content_length


def _check_headers(request: web.Request, is_form: bool, max_bytes: int) -> None:
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        # Inflating would let a few bytes become very many, and pictures are compressed as they are.
        raise RequestRefused(ErrorCode.UNSUPPORTED_CONTENT_ENCODING, "Send the picture without a Content-Encoding.")
    if not (is_form or request.content_type.startswith("image/") or request.content_type == "application/octet-stream"):
        raise RequestRefused(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE,
            "Send the picture as multipart/form-data in the field `file`, or as the body itself with its own Content-Type.",
            details={"accepted": ["multipart/form-data", *RAW_TYPES.split(", ")]},
        )
    overhead = _MULTIPART_OVERHEAD_BYTES if is_form else 0
    if request.content_length is not None and request.content_length > max_bytes + overhead:
        raise _too_large(max_bytes)


async def _read_raw(request: web.Request, ticket: Ticket, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in request.content.iter_any():
        _take(data, chunk, ticket, max_bytes)
    if not data:
        raise _missing()
    return bytes(data)


async def _read_form(request: web.Request, ticket: Ticket, max_bytes: int) -> Upload:
    picture: bytes | None = None
    fields: list[tuple[str, str]] = []
    parts = await request.multipart()
    for _ in range(_MOST_PARTS):
        part = await parts.next()
        if part is None:
            break
        if not isinstance(part, BodyPartReader) or part.name is None:
            raise RequestRefused(ErrorCode.INVALID_BODY, "Every part of the form needs a name and no parts of its own.")
        if part.name not in FILE_FIELDS:
            fields.append((part.name, await _read_text(part, ticket)))
        elif picture is None:
            picture = await _read_picture(part, ticket, max_bytes)
        else:
            raise RequestRefused(ErrorCode.INVALID_BODY, "The form has more than one picture.")
    else:
        raise RequestRefused(ErrorCode.INVALID_BODY, f"The form has more than {_MOST_PARTS - 1} parts.")
    if picture is None:
        raise _missing()
    return Upload(picture, fields)


async def _read_picture(part: BodyPartReader, ticket: Ticket, max_bytes: int) -> bytes:
    data = bytearray()
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        _take(data, chunk, ticket, max_bytes)
    return bytes(data)


async def _read_text(part: BodyPartReader, ticket: Ticket) -> str:
    data = bytearray()
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        _take(data, chunk, ticket, _LONGEST_FIELD_BYTES)
    # UnicodeDecodeError is a ValueError: an INVALID_BODY.
    return data.decode()


def _take(data: bytearray, chunk: bytes, ticket: Ticket, max_bytes: int) -> None:
    if len(data) + len(chunk) > max_bytes:
        raise _too_large(max_bytes)
    ticket.hold(len(chunk))
    data += chunk


def _too_large(max_bytes: int) -> RequestRefused:
    return RequestRefused(
        ErrorCode.BODY_TOO_LARGE, f"More than {max_bytes} bytes are not taken.", details={"max_bytes": max_bytes}
    )


def _too_slow(timeout_seconds: float) -> RequestRefused:
    return RequestRefused(ErrorCode.BODY_TIMEOUT, f"The body did not arrive within {timeout_seconds:g} s.")


def _missing() -> RequestRefused:
    return RequestRefused(
        ErrorCode.MISSING_IMAGE, "There is no picture: send it in the form field `file`, or as the body itself."
    )
