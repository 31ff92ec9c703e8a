"""The filter language: what is let in, what it means, and that no text of a filter becomes a part of an expression.

That the stores select what a filter means is held by tests/contract/test_filter.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.metadata_store.interface import ImageRow
from infra.metadata_store.narrowing import in_group
from infra.vector_store.expression import between, literal, narrowed, next_prefix, one_of, stored_text
from query_service.endpoint import parse
from query_service.errors import RequestRefused
from schemas.api import FILTER_EXAMPLES, ErrorCode, ImageParameters, ListParameters, SearchParameters, SimilarParameters
from schemas.filter import Filter, FilterGroup, Place
from schemas.identity import ObjectId, ObjectRef, content_hash_of
from schemas.tables import RowState
from tests.filters import NASTY_KEYS, documents, group_of

# Near each other and at the edges of what UTF-8 does: a text from all of Unicode would hardly ever start with another.
EDGES = ["a", "b", "`", "\x00", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"]
texts = st.text(st.sampled_from(EDGES), max_size=4) | st.text(st.characters(codec="utf-8"), max_size=4)


@given(prefix=texts, tail=texts, other=texts)
@example(prefix="\ud7ff", tail="", other="\ue000")
@example(prefix="a\U0010ffff", tail="z", other="b")
@example(prefix="\U0010ffff", tail="", other="\U0010ffff\U0010ffff")
def test_the_range_holds_exactly_what_starts_with_the_prefix(prefix: str, tail: str, other: str) -> None:
    above = next_prefix(prefix)
    for key in (prefix + tail, other):
        assert (prefix <= key and (above is None or key < above)) == key.startswith(prefix)
        # The stores compare bytes.
        first, found = prefix.encode(), key.encode()
        assert (first <= found and (above is None or found < above.encode())) == key.startswith(prefix)


@given(prefix=texts)
def test_the_upper_end_can_be_sent_as_utf8(prefix: str) -> None:
    above = next_prefix(prefix)
    assert above is None or above.encode().decode() == above


@pytest.mark.parametrize("prefix", ["", "\U0010ffff", "\U0010ffff\U0010ffff"])
def test_nothing_is_above_the_last_code_points(prefix: str) -> None:
    assert next_prefix(prefix) is None


@pytest.mark.parametrize(
    ("place", "holds"),
    [
        (Place(), True),
        (Place(bucket="images"), True),
        (Place(bucket="other"), False),
        (Place(prefix="a/"), True),
        (Place(prefix="A/"), False),
        (Place(bucket="images", prefix="a/b.jpg "), False),
    ],
)
def test_a_place_is_bucket_and_prefix(place: Place, holds: bool) -> None:
    assert place.holds(ObjectRef("images", "a/b.jpg")) is holds


@given(st.text())
def test_a_literal_is_one_string_whatever_is_in_it(text: str) -> None:
    written = literal(text)
    assert json.loads(written) == stored_text(text)
    inside = written[1:-1].replace("\\\\", "").replace('\\"', "")
    assert '"' not in inside
    assert "\\ud" not in inside  # the server's parser takes no pairs of surrogates


@given(st.text(st.characters(categories=["Cs"]) | st.sampled_from(EDGES)))
def test_what_is_stored_is_utf8_and_as_long_as_the_key(text: str) -> None:
    assert len(stored_text(text).encode()) == len(text.encode("utf-8", "surrogatepass"))


def test_expressions() -> None:
    first, last = ObjectId(bytes(32)), ObjectId(b"\xff" * 32)
    assert narrowed(Filter()) == ""
    assert narrowed(Filter("images", 'a"')) == 'bucket == "images" and key >= "a\\"" and key < "a#"'
    assert narrowed(Filter(prefix="\U0010ffff")) == 'key >= "\U0010ffff"'
    assert one_of([first, last]) == f'object_id in ["{"0" * 64}", "{"f" * 64}"]'
    assert between(None, None) == 'object_id > ""'
    assert between(first, last) == f'object_id > "{"0" * 64}" and object_id <= "{"f" * 64}"'


def test_a_group_is_bracketed_whatever_it_holds() -> None:
    large, png, old = (
        {"field": "size", "range": {"gte": 5, "lt": 9}},
        {"field": "format", "match": {"any": ["png", "gif"]}},
        {"field": "put_time", "range": {"lte": "1970-01-01T01:00:00.000001+01:00"}},
    )
    where = group_of({"must": [large], "should": [png, {"must": [old]}], "must_not": [old]})
    assert narrowed(Filter("images", "", where)) == (
        'bucket == "images" and ((size >= 5 and size < 9) and (format in ["PNG", "GIF"] or ((put_time <= 1)))'
        " and not ((put_time <= 1)))"
    )


# -- no text gets out of its literal -------------------------------------------------------------------------------------
def skeleton(expression: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', "TEXT", expression, flags=re.DOTALL)


texts_sent = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    # Nothing is above this prefix, so it is asked for by one comparison instead of two.
    lambda text: text.strip("\U0010ffff") != ""
)


@given(texts_sent | st.sampled_from([key for key in NASTY_KEYS if key.strip("\U0010ffff")]))
def test_an_expression_has_the_same_shape_whatever_the_texts(text: str) -> None:
    def asked(key: str) -> FilterGroup:
        equal, among, starts = (
            {"field": "key", "match": match} for match in ({"value": key}, {"any": [key, key]}, {"prefix": key})
        )
        return group_of({"must": [equal, among], "should": [starts, equal], "must_not": [starts]})

    assert skeleton(narrowed(Filter("images", text, asked(text)))) == skeleton(narrowed(Filter("images", "a", asked("a"))))
    assert str(in_group(asked(text))) == str(in_group(asked("a")))


@given(documents(["images", "others"]))
def test_whatever_is_let_in_is_made_of_known_words(document: dict[str, Any]) -> None:
    words = set(re.findall(r"[^\s()\[\],]+", skeleton(narrowed(Filter(where=group_of(document))))))
    fields = {"bucket", "key", "content_hash", "put_time", "size", "width", "height", "format"}
    operators = {"and", "or", "not", "in", ">", ">=", "<", "<=", "TEXT"}
    assert {word for word in words - fields - operators if not re.fullmatch(r"-?\d+", word)} == set()


# -- what is let in ------------------------------------------------------------------------------------------------------
def sent(text: str) -> FilterGroup:
    found = parse(ListParameters, {"filter": text}).filter
    assert found is not None
    return found


def clause(text: str) -> str:
    return f'{{"must": [{text}]}}'


@pytest.mark.parametrize(
    ("text", "at", "problem"),
    [
        ("no json", None, "JSON"),
        ("null", None, "an object"),
        ("[]", None, "an object"),
        ("{}", None, "at least one of: must, should, must_not"),
        ('{"must": []}', None, "an empty list: must"),
        ('{"must": {}}', "must", "a list"),
        ('{"musst": []}', "musst", "not known"),
        (clause("7"), "must.0", "needs a field"),
        (clause('{"field": 7}'), "must.0", "needs a field"),
        (clause('{"field": "sise", "match": {"value": 7}}'), "must.0", "needs a field"),
        (clause('{"field": "metadata.colour", "match": {"value": "red"}}'), "must.0", "needs a field"),
        (clause('{"key": "size", "match": {"value": 7}}'), "must.0.key", "not known"),
        (clause('{"field": "size"}'), "must.0", "exactly one of: match, range"),
        (clause('{"field": "size", "match": {"value": 7}, "range": {"gt": 7}}'), "must.0", "exactly one of"),
        (clause('{"field": "size", "match": {}}'), "must.0.match", "exactly one of: value, any"),
        (clause('{"field": "size", "match": {"value": null}}'), "must.0.match", "exactly one of: value, any"),
        (clause('{"field": "size", "match": {"any": []}}'), "must.0.match", "an empty list: any"),
        (clause('{"field": "size", "match": {"value": "7"}}'), "must.0.match.value", "integer"),
        (clause('{"field": "size", "match": {"value": 7.5}}'), "must.0.match.value", "integer"),
        (clause('{"field": "size", "match": {"value": true}}'), "must.0.match.value", "integer"),
        (clause('{"field": "size", "range": {"gt": -1}}'), "must.0.range.gt", "greater than"),
        (clause(f'{{"field": "size", "range": {{"lt": {2**63}}}}}'), "must.0.range.lt", "less than"),
        (clause('{"field": "size", "range": {}}'), "must.0.range", "at least one of: gt, gte, lt, lte"),
        (clause('{"field": "size", "range": {"gt": null}}'), "must.0.range", "at least one of"),
        (clause('{"field": "size", "range": {"above": 7}}'), "must.0.range.above", "not known"),
        (clause('{"field": "size", "match": {"prefix": "7"}}'), "must.0.match.prefix", "not known"),
        (clause('{"field": "put_time", "range": {"gt": "2026-01-01"}}'), "must.0.range.gt", "such as"),
        (clause('{"field": "put_time", "range": {"gt": "2026-01-01T00:00:00"}}'), "must.0.range.gt", "such as"),
        (clause('{"field": "put_time", "range": {"gt": "2026-02-30T00:00:00Z"}}'), "must.0.range.gt", "day"),
        (clause('{"field": "put_time", "range": {"gt": "2026-01-01T00:00:00.1234567Z"}}'), "must.0.range.gt", "six decimals"),
        (clause('{"field": "put_time", "range": {"gt": 1700000000}}'), "must.0.range.gt", "such as"),
        (clause('{"field": "put_time", "match": {"value": "2026-01-01T00:00:00Z"}}'), "must.0.range", "required"),
        (clause('{"field": "key", "match": {"prefix": ""}}'), "must.0.match.prefix", "at least 1"),
        (clause('{"field": "key", "match": {"value": "a\\u0000"}}'), "must.0.match.value", "NUL"),
        (clause('{"field": "key", "match": {"value": "\\udcff"}}'), None, "JSON"),
        (clause(f'{{"field": "key", "match": {{"value": "{"é" * 513}"}}}}'), "must.0.match.value", "1024 bytes"),
        (clause('{"field": "bucket", "match": {"value": "No Bucket"}}'), "must.0.match.value", "pattern"),
        (clause('{"field": "format", "match": {"value": "image/png"}}'), "must.0.match.value", "pattern"),
        (clause('{"field": "content_hash", "match": {"value": "abc"}}'), "must.0.match.value", "pattern"),
        (
            clause(clause(clause(clause(clause(clause('{"field": "size"}')))))),
            "must.0.must.0.must.0.must.0.must.0.must.0",
            "one of",
        ),
        (
            clause(clause(clause(clause(clause(clause('{"field": "size", "match": {"value": 7}}')))))),
            None,
            "more than 5 groups",
        ),
        (clause(", ".join(['{"field": "size", "match": {"value": 7}}'] * 65)), None, "more than 64"),
        (clause(f'{{"field": "size", "match": {{"any": {list(range(257))}}}}}'), None, "more than 256"),
        ("[" * 5000, None, "JSON"),
    ],
)
def test_a_wrong_filter_is_refused_and_says_where(text: str, at: str | None, problem: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        sent(text)
    first = refused.value.details["parameters"][0]
    assert refused.value.code is ErrorCode.INVALID_FILTER
    assert (first["parameter"], problem in first["problem"]) == ("filter", True), first
    assert first.get("at") == at


def test_many_mistakes_make_no_endless_answer() -> None:
    with pytest.raises(RequestRefused) as refused:
        sent(clause(", ".join(["7"] * 1000)))
    assert len(refused.value.details["parameters"]) == 20


def test_a_wrong_filter_beside_another_wrong_parameter_is_an_invalid_request() -> None:
    with pytest.raises(RequestRefused) as refused:
        parse(SearchParameters, {"filter": "{}", "limit": "0"})
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert {entry["parameter"] for entry in refused.value.details["parameters"]} == {"filter", "limit"}


def test_a_route_without_filters_does_not_know_the_parameter() -> None:
    with pytest.raises(RequestRefused) as refused:
        parse(ImageParameters, {"filter": json.dumps(FILTER_EXAMPLES[0])})
    assert refused.value.code is ErrorCode.INVALID_REQUEST


@given(documents(["images"]))
def test_what_is_let_in_comes_back_as_it_was(document: dict[str, Any]) -> None:
    group = group_of(document)
    assert FilterGroup.model_validate_json(group.model_dump_json(exclude_unset=True)) == group


@pytest.mark.parametrize("model", [SearchParameters, SimilarParameters, ListParameters])
@pytest.mark.parametrize("document", FILTER_EXAMPLES)
def test_the_examples_are_let_in(model: type[SimilarParameters | ListParameters], document: dict[str, Any]) -> None:
    narrow = parse(model, {"filter": json.dumps(document), "bucket": "images", "prefix": "a/"}).narrow
    assert (narrow.bucket, narrow.prefix, narrow.where) == ("images", "a/", group_of(document))


# -- what it means -------------------------------------------------------------------------------------------------------
PICTURE = ImageRow(
    ObjectRef("images", "a/b.jpg"),
    RowState.INDEXED,
    1,
    0,
    content_hash=content_hash_of(b"a"),
    put_time_us=1_700_000_000_000_001,
    size=1000,
    width=640,
    height=480,
    format="JPEG",
)
FAILED = ImageRow(ObjectRef("images", "broken.jpg"), RowState.FAILED, 1, 0)

WIDE: dict[str, Any] = {"field": "width", "range": {"gte": 640}}
TALL: dict[str, Any] = {"field": "height", "range": {"gt": 480}}


@pytest.mark.parametrize(
    ("document", "picture", "failed"),
    [
        ({"must": [WIDE]}, True, False),
        ({"must": [WIDE, TALL]}, False, False),
        ({"should": [WIDE, TALL]}, True, False),
        ({"must_not": [WIDE]}, False, True),
        ({"must_not": [TALL]}, True, True),
        ({"must_not": [WIDE, TALL]}, False, True),
        ({"must": [WIDE], "should": [TALL], "must_not": [TALL]}, False, False),
        ({"must_not": [{"must": [WIDE, TALL]}]}, True, True),
        ({"must": [{"field": "bucket", "match": {"value": "images"}}]}, True, True),
        ({"must": [{"field": "bucket", "match": {"any": ["other", "others"]}}]}, False, False),
        ({"must": [{"field": "key", "match": {"prefix": "a/"}}]}, True, False),
        ({"must": [{"field": "key", "match": {"prefix": "A/"}}]}, False, False),
        ({"must": [{"field": "key", "match": {"value": "a/b.jpg "}}]}, False, False),
        ({"must": [{"field": "format", "match": {"value": "jpeg"}}]}, True, False),
        ({"must": [{"field": "content_hash", "match": {"value": content_hash_of(b"a").hex()}}]}, True, False),
        ({"must": [{"field": "size", "match": {"any": [999, 1000]}}]}, True, False),
        ({"must": [{"field": "size", "range": {"gt": 999, "lt": 1001}}]}, True, False),
        ({"must": [{"field": "put_time", "range": {"gt": "2023-11-14T22:13:20Z"}}]}, True, False),
        ({"must": [{"field": "put_time", "range": {"gt": "2023-11-14T23:13:20.000001+01:00"}}]}, False, False),
        ({"must": [{"field": "put_time", "range": {"lte": "2023-11-14t22:13:20.000001z"}}]}, True, False),
    ],
)
def test_what_a_filter_means(document: dict[str, Any], picture: bool, failed: bool) -> None:
    narrow = Filter(where=group_of(document))
    assert (narrow.matches(PICTURE), narrow.matches(FAILED)) == (picture, failed)
    assert not Filter("others", where=narrow.where).matches(PICTURE)
    assert not Filter(prefix="c", where=narrow.where).matches(PICTURE)
