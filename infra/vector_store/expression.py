"""Filter expressions of the vector store. Every literal in one goes through `literal`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from schemas.filter import Filter, next_prefix
from schemas.identity import ObjectId

_SURROGATE = re.compile("[\ud800-\udfff]")


def stored_text(text: str) -> str:
    """What the server can hold of `text`: UTF-8, so a lone surrogate becomes U+FFFD, which is as long in bytes."""
    return _SURROGATE.sub("\ufffd", text)


def literal(text: str) -> str:
    """`text` as a string literal, whatever it contains.

    Characters stay as they are: the server's parser knows \\uXXXX, but not the pairs of them that JSON writes for a
    character above U+FFFF.
    """
    return json.dumps(stored_text(text), ensure_ascii=False)


def narrowed(narrow: Filter) -> str:
    """Empty when nothing is left out."""
    parts = []
    if narrow.bucket is not None:
        parts.append(f"bucket == {literal(narrow.bucket)}")
    if narrow.prefix:
        prefix = stored_text(narrow.prefix)
        parts.append(f"key >= {literal(prefix)}")
        above = next_prefix(prefix)
        if above is not None:
            parts.append(f"key < {literal(above)}")
    return " and ".join(parts)


def one_of(ids: Iterable[ObjectId]) -> str:
    return f"object_id in [{', '.join(literal(object_id.hex()) for object_id in ids)}]"


def between(after: ObjectId | None, last: ObjectId | None) -> str:
    """Ids above `after` (None: from the first), up to and with `last` (None: to the end)."""
    parts = [f"object_id > {literal(after.hex() if after is not None else '')}"]
    if last is not None:
        parts.append(f"object_id <= {literal(last.hex())}")
    return " and ".join(parts)
