"""The one filter language: what a search, a list or a scan is narrowed to."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.identity import ObjectRef


@dataclass(frozen=True, slots=True)
class Filter:
    """`prefix` compares the bytes of the key."""

    bucket: str | None = None
    prefix: str = ""

    def matches(self, ref: ObjectRef) -> bool:
        return (self.bucket is None or ref.bucket == self.bucket) and ref.key.startswith(self.prefix)


def next_prefix(prefix: str) -> str | None:
    """The least text above every text that starts with `prefix`; None when there is none.

    `key >= prefix and key < next_prefix(prefix)` is how both stores are asked for a prefix: LIKE would need escaping, and
    Milvus 2.3 knows only a part of it. Code points above the surrogates keep UTF-8's order.
    """
    for position in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[position])
        if code == 0x10FFFF:
            continue
        following = 0xE000 if code == 0xD7FF else code + 1
        return prefix[:position] + chr(following)
    return None
