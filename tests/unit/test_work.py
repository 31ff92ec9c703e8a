"""Parsing, collapsing, and dropping what is known: steps 1 to 3, as pure functions."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidEvent
from infra.metadata_store.interface import ImageRow
from processors.work import Delivery, Seen, Work, collapse, is_known, parse
from schemas.events import Cause, ObjectChange, ObjectEvent, ReasonCode
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef
from schemas.tables import RowState

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MODEL = ModelFingerprint("f" * 64)
CONTENT = ContentHash(b"c" * 32)


def event(**data: Any) -> ObjectEvent:
    change = {"bucket": "images", "key": "a.jpg", "cause": Cause.NOTIFICATION, **data}
    return ObjectEvent(
        id="1", source="/image-search/test/images", subject="images/a.jpg", time=WHEN, data=ObjectChange(**change)
    )


def delivery(value: bytes) -> Delivery:
    return Delivery("objects", 0, 7, 0, b"images/a.jpg", value)


def work(**data: Any) -> Work:
    return parse(delivery(event(**data).to_json()))


def row(**columns: Any) -> ImageRow:
    base = ImageRow(
        ref=ObjectRef("images", "a.jpg"),
        state=RowState.INDEXED,
        generation=3,
        published_generation=3,
        content_hash=CONTENT,
        etag="e1",
        put_time_us=int(WHEN.timestamp()) * 1_000_000,
    )
    return replace(base, **columns)


@given(st.text(min_size=1, max_size=200).filter(lambda key: len(key.encode("utf-8", "surrogatepass")) <= 1024))
def test_any_key_survives_the_way_over_the_topic(key: str) -> None:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in key):
        return  # the broker carries UTF-8
    assert work(key=key).ref == ObjectRef("images", key)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", ReasonCode.EVENT_NOT_JSON),
        (b"not json", ReasonCode.EVENT_NOT_JSON),
        (b"\xff\xfe", ReasonCode.EVENT_NOT_JSON),
        (b"{}", ReasonCode.EVENT_INVALID),
        (b"[]", ReasonCode.EVENT_INVALID),
        (b"null", ReasonCode.EVENT_INVALID),
    ],
)
def test_what_is_no_event_is_refused(value: bytes, reason: ReasonCode) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse(delivery(value))
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "image-search.image.indexed"}, ReasonCode.EVENT_UNKNOWN_TYPE),
        ({"time": "yesterday"}, ReasonCode.EVENT_INVALID),
        ({"specversion": "0.3"}, ReasonCode.EVENT_INVALID),
        ({"data": {"bucket": "images"}}, ReasonCode.EVENT_INVALID),
        ({"data": {"bucket": "images", "key": "ä" * 513, "cause": "scan"}}, ReasonCode.EVENT_INVALID),
        ({"data": {"bucket": "images", "key": "", "cause": "scan"}}, ReasonCode.EVENT_INVALID),
        ({"data": {"bucket": "bücher", "key": "a", "cause": "scan"}}, ReasonCode.EVENT_INVALID),
        ({"data": {"bucket": "images", "key": "a", "cause": "weather"}}, ReasonCode.EVENT_INVALID),
    ],
)
def test_an_event_that_lacks_something_is_refused_with_its_reason(change: dict[str, Any], reason: ReasonCode) -> None:
    value = {**json.loads(event().to_json()), **change}
    with pytest.raises(InvalidEvent) as caught:
        parse(delivery(json.dumps(value).encode()))
    assert caught.value.reason is reason


@given(st.binary(max_size=300))
def test_any_bytes_are_an_event_or_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidEvent):
        parse(delivery(value))


def test_fields_of_a_later_version_are_no_error() -> None:
    value = json.loads(event().to_json())
    value["data"]["colour"] = "blue"
    assert parse(delivery(json.dumps(value).encode())).ref.key == "a.jpg"


def test_the_last_event_stands_with_the_strongest_cause() -> None:
    first, last = work(cause=Cause.REPAIR, etag="old"), work(etag="new")
    (collapsed,) = collapse([first, last])
    assert collapsed.change.cause is Cause.REPAIR


def test_a_late_old_notification_does_not_take_the_new_one_with_it() -> None:
    """Row and late event say e1; the event before it says e2, which is what lies in the bucket."""
    (collapsed,) = collapse([work(etag="e2", put_time=WHEN), work(etag="e1", put_time=WHEN)])
    assert not is_known(collapsed, Seen(row(), {MODEL: CONTENT}), [MODEL])


def test_the_same_notification_several_times_in_a_batch_is_known() -> None:
    (collapsed,) = collapse([work(etag="e1", put_time=WHEN)] * 3)
    assert is_known(collapsed, Seen(row(), {MODEL: CONTENT}), [MODEL])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(Cause))), max_size=20))
def test_collapsing_keeps_one_work_an_object(events: list[tuple[str, Cause]]) -> None:
    works = [work(key=key, cause=cause) for key, cause in events]
    collapsed = collapse(works)
    assert {one.ref.key for one in collapsed} == {key for key, _ in events}
    assert len({one.ref.key for one in collapsed}) == len(collapsed)
    for one in collapsed:
        assert one.change.cause.strength == max(cause.strength for key, cause in events if key == one.ref.key)


def test_a_doubled_notification_is_known() -> None:
    assert is_known(work(etag="e1", put_time=WHEN), Seen(row(), {MODEL: CONTENT}), [MODEL])


@pytest.mark.parametrize("cause", [cause for cause in Cause if cause is not Cause.NOTIFICATION])
def test_only_a_notification_is_dropped(cause: Cause) -> None:
    assert not is_known(work(etag="e1", put_time=WHEN, cause=cause), Seen(row(), {MODEL: CONTENT}), [MODEL])


@pytest.mark.parametrize(
    ("data", "columns", "models"),
    [
        ({"etag": "e2", "put_time": WHEN}, {}, {MODEL: CONTENT}),
        ({"etag": "e1", "put_time": WHEN.replace(second=6)}, {}, {MODEL: CONTENT}),
        ({"etag": "e1"}, {}, {MODEL: CONTENT}),
        ({"put_time": WHEN}, {}, {MODEL: CONTENT}),
        ({"etag": "e1", "put_time": WHEN, "removed": True}, {}, {MODEL: CONTENT}),
        ({"etag": "e1", "put_time": WHEN}, {"state": RowState.DELETED}, {MODEL: CONTENT}),
        ({"etag": "e1", "put_time": WHEN}, {"published_generation": 2}, {MODEL: CONTENT}),
        ({"etag": "e1", "put_time": WHEN}, {}, {}),
        ({"etag": "e1", "put_time": WHEN}, {}, {MODEL: ContentHash(b"d" * 32)}),
    ],
)
def test_whatever_differs_is_worked_on(data: dict[str, Any], columns: dict[str, Any], models: dict[Any, Any]) -> None:
    assert not is_known(work(**data), Seen(row(**columns), models), [MODEL])


def test_after_a_lost_race_nothing_is_known() -> None:
    assert not is_known(work(etag="e1", put_time=WHEN).again(), Seen(row(), {MODEL: CONTENT}), [MODEL])


def test_a_failed_object_needs_no_vector_to_be_known() -> None:
    assert is_known(work(etag="e1", put_time=WHEN), Seen(row(state=RowState.FAILED), {}), [MODEL])
