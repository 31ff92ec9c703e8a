"""Objects and filters that have something to do with each other: both are drawn from the same few values and their edges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import strategies as st

from infra.metadata_store.interface import ImageRow
from schemas.filter import Filter, FilterGroup
from schemas.identity import ObjectRef, content_hash_of
from schemas.tables import RowState

Json = dict[str, Any]

NASTY_KEYS = [
    "plain.jpg",
    "Plain.jpg",
    "plain.jpg ",
    "plain.jpg\t",
    " plain.jpg",
    'with "double" quotes',
    "with 'single' quotes",
    "with `back` ticks",
    "back\\slash",
    "ends with \\",
    'both \\" of them',
    "\\u0041 \\x41 \\101 \\n \\%",
    "line\nbreak\ttab\rreturn",
    "\x01\x08\x0b\x0c\x1f\x7f",
    "100%",
    "100%_like_%",
    "1000",
    "{template} :bind %s %(name)s ? $1",
    '"] or object_id > ["',
    '" or key > "',
    "' OR '1'='1' -- ",
    "x') ; DROP TABLE images; /* */",
    "ä/日本/写真.png",
    "a\u0301.jpg",
    "á.jpg",
    "ß.jpg",
    "ss.jpg",
    "😀",
    "\u2028\u2029\ufffd\ue000",
    "\U0010ffff",
    "\U0010ffff\U0010ffff",
    "é" * 512,
    "x" * 1024,
    "x" * 1023,
]

NUMBERS = [0, 1, 640, 641, 1920, 2**31 - 1]
SIZES = [*NUMBERS, 2**31, 2**53 + 1, 2**63 - 2, 2**63 - 1]
TIMES_US = [-1, 0, 1, 1_700_000_000_123_455, 1_700_000_000_123_456, 1_700_000_001_000_000, 253_402_300_799_999_999]
_FORMATS = ["JPEG", "PNG", "WEBP"]
_HASHES = [content_hash_of(letter) for letter in (b"a", b"b", b"c")]
_LETTERS = "aAbB \\\"'%_\x01\x7fé日\ud7ff\ue000😀\U0010ffff"

keys = st.sampled_from(NASTY_KEYS) | st.text(st.sampled_from(_LETTERS), min_size=1, max_size=4)
_prefixes = st.builds(lambda key, length: key[: length + 1], keys, st.integers(0, 6)) | keys


@st.composite
def rows(draw: st.DrawFn, buckets: Sequence[str], *, whole: bool) -> list[ImageRow]:
    """`whole`: everything is known of each, as of an indexed one."""
    unknown: st.SearchStrategy[Any] = st.nothing() if whole else st.none()
    places = st.lists(st.builds(ObjectRef, st.sampled_from(buckets), keys), min_size=1, max_size=8, unique=True)
    return [
        ImageRow(
            ref,
            RowState.INDEXED if whole else RowState.FAILED,
            generation=1,
            published_generation=0,
            content_hash=draw(unknown | st.sampled_from(_HASHES)),
            put_time_us=draw(unknown | st.sampled_from(TIMES_US)),
            size=draw(unknown | st.sampled_from(SIZES)),
            width=draw(unknown | st.sampled_from(NUMBERS)),
            height=draw(unknown | st.sampled_from(NUMBERS)),
            format=draw(unknown | st.sampled_from(_FORMATS)),
        )
        for ref in draw(places)
    ]


def _match(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({"value": values}) | st.fixed_dictionaries({"any": st.lists(values, min_size=1, max_size=3)})


def _range(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    bounds = st.sampled_from(["gt", "gte", "lt", "lte"])
    return st.dictionaries(bounds, values, min_size=1, max_size=2)


def _condition(fields: Sequence[str], kind: str, asked: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({"field": st.sampled_from(fields), kind: asked})


def written_time(microseconds: int, hours: int = 0) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    # Not where the hours would lead out of the years that there are.
    return (moment.astimezone(timezone(timedelta(hours=hours))) if moment.year < 9999 else moment).isoformat()


def conditions(buckets: Sequence[str]) -> st.SearchStrategy[Json]:
    near = st.integers(-1, 1)
    numbers = st.builds(lambda number, off: min(max(number + off, 0), 2**63 - 1), st.sampled_from(SIZES), near)
    times = st.builds(written_time, st.sampled_from(TIMES_US), st.sampled_from([-8, 0, 9]))
    names = ["size", "width", "height"]
    return st.one_of(
        _condition(["bucket"], "match", _match(st.sampled_from([*buckets, "elsewhere"]))),
        _condition(["key"], "match", _match(keys) | st.fixed_dictionaries({"prefix": _prefixes})),
        _condition(["content_hash"], "match", _match(st.sampled_from([*(found.hex() for found in _HASHES), "0" * 64]))),
        _condition(["format"], "match", _match(st.sampled_from(["jpeg", "PNG", "Webp", "GIF"]))),
        _condition(names, "match", _match(numbers)),
        _condition(names, "range", _range(numbers)),
        _condition(["put_time"], "range", _range(times)),
    )


def _groups(clauses: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    lists = st.lists(clauses, min_size=1, max_size=3)
    return st.dictionaries(st.sampled_from(["must", "should", "must_not"]), lists, min_size=1)


def documents(buckets: Sequence[str]) -> st.SearchStrategy[Json]:
    """Filters as they are sent."""
    return _groups(st.recursive(conditions(buckets), _groups, max_leaves=6))


def filters(buckets: Sequence[str]) -> st.SearchStrategy[Filter]:
    """Each lets nothing in from outside these buckets."""
    return st.builds(
        Filter,
        st.sampled_from([None, None, None, *buckets]),
        st.just("") | st.just("") | st.just("") | _prefixes,
        documents(buckets).map(lambda document: group_of({"must": [within(buckets), document]})),
    )


def within(buckets: Sequence[str]) -> Json:
    return {"field": "bucket", "match": {"any": list(buckets)}}


def group_of(document: Json) -> FilterGroup:
    return FilterGroup.model_validate_json(json.dumps(document, ensure_ascii=False))
