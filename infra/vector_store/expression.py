"""Filters as expressions of the vector store. Every text in one goes through `literal`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from schemas.filter import Between, Condition, Filter, FilterGroup, OneOf, StartsWith
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
    """Empty when nothing is left out.

    A key with bytes that are no UTF-8 is stored with U+FFFD in their place, and is narrowed as if it were so: only a row can
    tell. Each part that has parts of its own is bracketed, so that no rule of precedence matters.
    """
    parts = []
    if narrow.bucket is not None:
        parts.append(f"bucket == {literal(narrow.bucket)}")
    if narrow.prefix:
        parts.append(_starts_with(narrow.prefix))
    if narrow.where is not None:
        parts.append(_in_group(narrow.where))
    return " and ".join(parts)


def _in_group(group: FilterGroup) -> str:
    parts = [_holds(clause) for clause in group.must]
    if group.should:
        parts.append(f"({' or '.join(_holds(clause) for clause in group.should)})")
    parts += [f"not ({_holds(clause)})" for clause in group.must_not]
    return f"({' and '.join(parts)})"


def _holds(clause: Condition | FilterGroup) -> str:
    if isinstance(clause, FilterGroup):
        return _in_group(clause)
    match clause.test:
        case OneOf(values):
            return f"{clause.field} in [{', '.join(_written(value) for value in values)}]"
        case StartsWith(prefix):
            return f"({_starts_with(prefix)})"
        case Between() as bounds:
            return f"({_between(clause.field, bounds)})"


def _written(value: str | int | bytes) -> str:
    match value:
        case int():
            return str(value)
        case bytes():
            return literal(value.hex())
        case str():
            return literal(value)


def _between(field: str, bounds: Between) -> str:
    compared = {">": bounds.gt, ">=": bounds.gte, "<": bounds.lt, "<=": bounds.lte}
    return " and ".join(f"{field} {sign} {bound}" for sign, bound in compared.items() if bound is not None)


def _starts_with(prefix: str) -> str:
    first = stored_text(prefix)
    above = next_prefix(first)
    return f"key >= {literal(first)}" + ("" if above is None else f" and key < {literal(above)}")


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


def one_of(ids: Iterable[ObjectId]) -> str:
    return f"object_id in [{', '.join(literal(object_id.hex()) for object_id in ids)}]"


def between(after: ObjectId | None, last: ObjectId | None) -> str:
    """Ids above `after` (None: from the first), up to and with `last` (None: to the end)."""
    parts = [f"object_id > {literal(after.hex() if after is not None else '')}"]
    if last is not None:
        parts.append(f"object_id <= {literal(last.hex())}")
    return " and ".join(parts)
