"""What people say of an image beside what is known of it: a bounded JSON object, changed by merge patches (RFC 7396)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

LARGEST_METADATA_BYTES = 16 * 1024
DEEPEST_METADATA = 5
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")

Metadata: TypeAlias = dict[str, Any]


def merged(document: Mapping[str, Any], patch: Mapping[str, Any]) -> Metadata:
    """`patch` over `document`: null takes a name away, objects are merged name by name, anything else is replaced."""
    result = dict(document)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, Mapping):
            standing = result.get(name)
            result[name] = merged(standing if isinstance(standing, Mapping) else {}, value)
        else:
            result[name] = value
    return result


def written(document: Mapping[str, Any]) -> str:
    """As JSON. Raises ValueError, with words for people, when it is more than an image may have."""
    _check(document, 1)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if len(text.encode()) > LARGEST_METADATA_BYTES:
        raise ValueError(f"metadata would be longer than {LARGEST_METADATA_BYTES} bytes as JSON")
    return text


def _check(value: object, depth: int) -> None:
    if not isinstance(value, (Mapping, list)):
        return
    if depth > DEEPEST_METADATA:
        raise ValueError(f"metadata has more than {DEEPEST_METADATA} objects and lists inside each other")
    if isinstance(value, Mapping):
        for name in value:
            if _NAME.fullmatch(name) is None:
                raise ValueError("a name in metadata has 1 to 64 characters, none of them a control character")
    for part in value.values() if isinstance(value, Mapping) else value:
        _check(part, depth + 1)
