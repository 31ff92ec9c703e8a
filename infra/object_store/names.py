"""Which buckets and keys can be asked for at all, the same for the real store and its twin."""

from __future__ import annotations

import re

from infra.errors import ImageRejected, StoreRefused
from schemas.events import ReasonCode
from schemas.filter import LARGEST_KEY_BYTES
from schemas.identity import RESERVED_PREFIX, ObjectRef

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IPV4 = re.compile(r"\d{1,3}(\.\d{1,3}){3}")
LARGEST_SEGMENT_BYTES = 255
_RESERVED_PREFIXES = ("xn--",)
_RESERVED_SUFFIXES = ("-s3alias", "--ol-s3")


def check_bucket_name(bucket: str) -> None:
    """Raises StoreRefused(BUCKET_NOT_FOUND) for what S3 allows as no bucket's name: no such bucket can exist."""
    well_formed = (
        _BUCKET.fullmatch(bucket) is not None
        and _IPV4.fullmatch(bucket) is None
        and not any(pair in bucket for pair in ("..", ".-", "-."))
        and not bucket.startswith(_RESERVED_PREFIXES)
        and not bucket.endswith(_RESERVED_SUFFIXES)
    )
    if not well_formed:
        raise StoreRefused(ReasonCode.BUCKET_NOT_FOUND, f"{bucket!r} is no bucket name that S3 allows")


def check_place(ref: ObjectRef) -> None:
    """Raises StoreRefused for an impossible bucket, ImageRejected(OBJECT_UNREADABLE) for a key that no request can carry.

    The S3 client refuses `.` and `..` as path segments, because proxies and servers resolve them to another key, and keys of
    nothing but blanks. Such an object is never asked for under a changed name, and never taken for gone.
    """
    check_bucket_name(ref.bucket)
    segments = ref.key.split("/")
    if not ref.key.strip() or "." in segments or ".." in segments or not _is_utf8(ref.key):
        raise ImageRejected(ReasonCode.OBJECT_UNREADABLE, "the key is blank, not UTF-8, or has a segment '.' or '..'")


def check_new_key(key: str) -> None:
    """Raises ImageRejected(OBJECT_UNREADABLE) for a key that we do not make, though there are stores that would take it.

    SeaweedFS stores `\\` and `//` as `/`: the object would lie at another key than its writer was told. A key that ends with
    `/` is a folder's mark there. Control characters are in nobody's interest.
    """
    if len(key.encode("utf-8", "surrogatepass")) > LARGEST_KEY_BYTES:
        raise ImageRejected(ReasonCode.OBJECT_UNREADABLE, f"the key is longer than {LARGEST_KEY_BYTES} bytes")
    if any(len(segment.encode("utf-8", "surrogatepass")) > LARGEST_SEGMENT_BYTES for segment in key.split("/")):
        raise ImageRejected(ReasonCode.OBJECT_UNREADABLE, f"a segment of the key is longer than {LARGEST_SEGMENT_BYTES} bytes")
    if key.startswith(RESERVED_PREFIX):
        raise ImageRejected(ReasonCode.OBJECT_UNREADABLE, f"keys that begin with {RESERVED_PREFIX} are the engine's own")
    if "\\" in key or "//" in f"/{key}/" or any(ord(letter) < 32 or ord(letter) == 127 for letter in key):
        raise ImageRejected(
            ReasonCode.OBJECT_UNREADABLE,
            "the key has a backslash, a control character, an empty segment, or a slash at its beginning or end",
        )


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
