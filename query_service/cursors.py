"""Opaque places to read on from: URL-safe text with a kind and a checksum, so that anything else is refused for certain."""

from __future__ import annotations

import base64
import binascii
import zlib
from enum import Enum

from query_service.errors import RequestRefused
from schemas.api import ErrorCode
from schemas.identity import ObjectRef

_CHECKSUM_BYTES = 4


class Kind(Enum):
    """The first byte. A form that changes gets a new one."""

    PAGE = b"p"
    EVENTS = b"e"


def not_a_cursor() -> RequestRefused:
    return RequestRefused(
        ErrorCode.INVALID_CURSOR, "This is no cursor of this kind. Use one that an answer gave you, unchanged, or leave it out."
    )


def seal(kind: Kind, body: bytes) -> str:
    whole = kind.value + body
    return base64.urlsafe_b64encode(whole + zlib.crc32(whole).to_bytes(_CHECKSUM_BYTES)).rstrip(b"=").decode()


def unseal(kind: Kind, text: str) -> bytes:
    """Raises RequestRefused (INVALID_CURSOR)."""
    try:
        # The URL-safe decoder of the library drops what it does not know; this one refuses it.
        raw = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise not_a_cursor() from None
    whole, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if not whole.startswith(kind.value) or zlib.crc32(whole).to_bytes(_CHECKSUM_BYTES) != checksum:
        raise not_a_cursor()
    return whole[1:]


def page_cursor(last: ObjectRef) -> str:
    return seal(Kind.PAGE, f"{last.bucket}\0{last.key}".encode("utf-8", "surrogatepass"))


def page_start(text: str) -> ObjectRef:
    """Raises RequestRefused (INVALID_CURSOR)."""
    bucket, _, key = unseal(Kind.PAGE, text).decode("utf-8", "surrogatepass").partition("\0")
    return ObjectRef(bucket, key)


def events_cursor(offsets: dict[int, int]) -> str:
    """The next offset of each partition, from 0 on, seven bits a byte: some 30 characters for 8 partitions."""
    body = bytearray()
    for partition in range(max(offsets, default=-1) + 1):
        body += _varint(offsets.get(partition, 0))
    return seal(Kind.EVENTS, bytes(body))


def events_start(text: str) -> dict[int, int]:
    """Raises RequestRefused (INVALID_CURSOR)."""
    offsets: dict[int, int] = {}
    value = shift = 0
    for byte in unseal(Kind.EVENTS, text):
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            offsets[len(offsets)] = value
            value = shift = 0
    return offsets


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
