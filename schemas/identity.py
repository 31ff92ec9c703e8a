"""The identities that every part shares. One primary key everywhere: the object id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NewType

ObjectId = NewType("ObjectId", bytes)
"""sha256(bucket + NUL + key), 32 bytes. 64 lower-case hex characters in JSON and in Milvus."""

ContentHash = NewType("ContentHash", bytes)
"""sha256 of an object's bytes, 32 bytes. Hex in JSON and in Milvus."""

ModelFingerprint = NewType("ModelFingerprint", str)
"""sha256 over everything that changes a vector (see processors/embedding/catalog.py), 64 hex characters."""

OBJECT_ID_BYTES = 32

RESERVED_PREFIX = ".image-search/"
"""Keys that begin with this are our own: no pictures, whatever lies there."""


@dataclass(frozen=True, slots=True, order=True)
class ObjectRef:
    """A place in a bucket. `key` is the raw key as the store knows it: never URL-encoded, never normalised."""

    bucket: str
    key: str

    @property
    def object_id(self) -> ObjectId:
        # Surrogates stand for bytes that were not UTF-8 on their way in: keep two such keys apart instead of failing.
        name = self.bucket.encode() + b"\0" + self.key.encode("utf-8", "surrogatepass")
        return ObjectId(hashlib.sha256(name).digest())

    @property
    def is_reserved(self) -> bool:
        return self.key.startswith(RESERVED_PREFIX)

    @property
    def topic_key(self) -> bytes:
        """The Kafka key of everything about this object, so that all of it lies in one partition of a topic."""
        return f"{self.bucket}/{self.key}".encode("utf-8", "surrogatepass")

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}"


def content_hash_of(data: bytes) -> ContentHash:
    return ContentHash(hashlib.sha256(data).digest())


def object_id_from_hex(text: str) -> ObjectId:
    """Raises ValueError unless `text` is 64 hex characters."""
    value = bytes.fromhex(text)
    if len(value) != OBJECT_ID_BYTES or len(text) != 2 * OBJECT_ID_BYTES:
        raise ValueError("an object id is 64 hex characters")
    return ObjectId(value)
