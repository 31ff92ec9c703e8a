"""Cursors: what was sealed comes back, all else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from query_service.cursors import events_cursor, events_start, page_cursor, page_start
from query_service.errors import RequestRefused
from schemas.api import ErrorCode
from schemas.identity import ObjectRef

KEYS = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=300)


@given(st.lists(st.integers(0, 2**62), max_size=50))
def test_offsets_come_back(offsets: list[int]) -> None:
    positions = dict(enumerate(offsets))
    assert events_start(events_cursor(positions)) == positions


@given(st.sampled_from(["images", "other-bucket"]), KEYS)
def test_places_come_back(bucket: str, key: str) -> None:
    ref = ObjectRef(bucket, key)
    assert page_start(page_cursor(ref)) == ref


def test_a_cursor_needs_no_escaping_and_fits_a_header() -> None:
    cursor = events_cursor(dict.fromkeys(range(1024), 2**28))
    assert cursor.replace("-", "").replace("_", "").isalnum()
    assert len(cursor) < 8000


@given(st.text(max_size=100))
def test_any_other_text_is_refused(text: str) -> None:
    for read in (events_start, page_start):
        with pytest.raises(RequestRefused) as refused:
            read(text)
        assert refused.value.code is ErrorCode.INVALID_CURSOR


@given(st.data())
def test_a_changed_cursor_is_refused(data: st.DataObject) -> None:
    cursor = events_cursor({0: 12345, 1: 678})
    # Not the last character: two of its bits are padding.
    place = data.draw(st.integers(0, len(cursor) - 2))
    other = data.draw(st.sampled_from([letter for letter in "AZaz09-_" if letter != cursor[place]]))
    with pytest.raises(RequestRefused):
        events_start(cursor[:place] + other + cursor[place + 1 :])


def test_a_cursor_of_one_kind_is_none_of_the_other() -> None:
    with pytest.raises(RequestRefused):
        events_start(page_cursor(ObjectRef("images", "a.jpg")))
    with pytest.raises(RequestRefused):
        page_start(events_cursor({0: 1}))
