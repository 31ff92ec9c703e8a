"""A prefix, asked for as a range, finds exactly what starts with it: in text, and in the expressions of the vector store."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.vector_store.expression import between, literal, narrowed, one_of, stored_text
from schemas.filter import Filter, next_prefix
from schemas.identity import ObjectId, ObjectRef

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
    ("narrow", "matches"),
    [
        (Filter(), True),
        (Filter(bucket="images"), True),
        (Filter(bucket="other"), False),
        (Filter(prefix="a/"), True),
        (Filter(prefix="A/"), False),
        (Filter(bucket="images", prefix="a/b.jpg "), False),
    ],
)
def test_a_filter_matches_bucket_and_prefix(narrow: Filter, matches: bool) -> None:
    assert narrow.matches(ObjectRef("images", "a/b.jpg")) is matches


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
