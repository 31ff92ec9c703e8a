"""The parser of S3 notifications, held to samples of each store (tests/data/notifications says where they come from)."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidEvent
from ingest_bridge.notifications.s3 import Notification, parse_message
from schemas.events import Cause, ObjectChange, ObjectEvent, ReasonCode

DATA = Path(__file__).parent.parent / "data" / "notifications"
BUCKETS = frozenset({"images", "other", "ver"})

EXPECTED = {
    "aws_delete.json": ["-a.jpg"],
    "aws_delete_marker.json": ["-a.jpg"],
    "aws_expired.json": ["-a.jpg"],
    "aws_put.json": ["+holiday/red flower+ä.jpg"],
    "aws_put_2_1.json": ["+a.jpg"],
    "aws_several_records.json": ["+1.jpg", "-2.jpg"],
    "aws_tagging.json": ["+a.jpg"],
    "aws_test_message.json": [],
    "aws_zero_records.json": [],
    "ceph_delete.json": ["-a.jpg"],
    "ceph_expired.json": ["-a.jpg"],
    "ceph_put.json": ["+dir/a+b %20ä.jpg"],
    "ceph_put_size_as_text.json": ["+myimage1.jpg"],
    "minio_all_versions.json": ["-a.jpg"],
    "minio_copy.json": ["+copy of zero.jpg"],
    "minio_delete.json": ["-copy of zero.jpg"],
    "minio_delete_marker.json": ["-v.jpg"],
    "minio_delete_missing.json": ["-never there.jpg"],
    "minio_delete_tagging.json": ["+zero.jpg"],
    "minio_delete_version.json": ["-v.jpg"],
    "minio_directory_marker.json": ["+dir/marker/"],
    "minio_key_japanese.json": ["+日本/写真.png"],
    "minio_key_long.json": ["+" + "/".join(["k" * 200] * 5) + "/" + "j" * 19],
    "minio_key_trailing_space.json": ["+ends in a space "],
    "minio_key_url_characters.json": ["+q?x#y&z=1;2.jpg"],
    "minio_multi_delete_1.json": ["-zero.jpg"],
    "minio_multi_delete_2.json": ["-not there.jpg"],
    "minio_multipart.json": ["+parts.bin"],
    "minio_overwrite.json": ["+dir/a+b %20ä.jpg"],
    "minio_put.json": ["+dir/a+b %20ä.jpg"],
    "minio_put_legal_hold.json": ["+v.jpg"],
    "minio_put_retention.json": ["+v.jpg"],
    "minio_put_tagging.json": ["+zero.jpg"],
    "minio_versioned_put.json": ["+v.jpg"],
    "minio_zero_bytes.json": ["+zero.jpg"],
    "rustfs_delete.json": ["-a.jpg"],
    "rustfs_expired.json": ["-a.jpg"],
    "rustfs_put.json": ["+dir/a b.jpg"],
    "sns_put.json": ["+holiday/red flower+ä.jpg"],
    "sns_subscription.json": [],
}

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda key: len(key.encode()) <= 1024)
ODD_KEYS = (
    "a b.jpg",
    "a+b.jpg",
    "a%20b.jpg",
    "a%2520b.jpg",
    "100%",
    "dir/ä é.jpg",
    "日本/写真.png",
    "ends in a space ",
    "q?x#y&z=1;2.jpg",
    "\x01",
    "k" * 1024,
)


def parse(message: bytes) -> Notification:
    return parse_message(message, deployment="local", buckets=BUCKETS)


def sample(name: str) -> bytes:
    return (DATA / name).read_bytes()


def only(notification: Notification) -> ObjectChange:
    (event,) = notification.events
    return event.data


def message(source: str = "minio:s3", name: str = "s3:ObjectCreated:Put", bucket: str = "images", **described: object) -> bytes:
    entity = {"bucket": {"name": bucket}, "object": {"key": "a.jpg", **described}}
    record = {"eventSource": source, "eventName": name, "eventTime": "2026-03-01T10:20:30.456Z", "s3": entity}
    return json.dumps({"Records": [record]}).encode()


def changed(sample_name: str, **fields: object) -> bytes:
    document: dict[str, Any] = json.loads(sample(sample_name))
    document["Records"][0].update(fields)
    return json.dumps(document).encode()


# -- each store's form -----------------------------------------------------------------------------------------------------
def test_every_sample_is_read_and_expected() -> None:
    assert {path.name for path in DATA.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_store_sent(name: str) -> None:
    notification = parse(sample(name))
    assert [("-" if event.data.removed else "+") + event.data.key for event in notification.events] == EXPECTED[name]
    assert {event.data.bucket for event in notification.events} <= {"images", "ver"}
    assert {event.data.cause for event in notification.events} <= {Cause.NOTIFICATION}
    assert notification.unknown_names == notification.no_change == 0
    for event in notification.events:
        assert ObjectEvent.model_validate_json(event.to_json()) == event


def test_what_a_creation_tells() -> None:
    (event,) = parse(sample("minio_put.json")).events
    assert event.time == datetime(2026, 11, 23, 11, 17, 59, 747000, tzinfo=UTC)
    assert (event.source, event.subject) == ("/image-search/local/images", "images/dir/a+b %20ä.jpg")
    assert (event.data.etag, event.data.size, event.data.version) == ("900150983cd24fb0d6963f7d28e17f72", 3, None)
    assert event.data.put_time == datetime(2026, 11, 23, 11, 17, 59, tzinfo=UTC)


def test_tags_leave_etag_and_put_time_alone_so_that_a_worker_drops_them_as_known() -> None:
    put, tagged = (only(parse(sample(f"minio_{name}.json"))) for name in ("zero_bytes", "put_tagging"))
    assert put.put_time is not None
    assert (put.etag, put.put_time) == (tagged.etag, tagged.put_time)


def test_the_outer_key_agrees_with_the_encoded_one() -> None:
    """MinIO tells the key twice: as it is, and form-encoded."""
    for path in DATA.glob("minio_*.json"):
        (event,) = parse(path.read_bytes()).events
        assert json.loads(path.read_bytes())["Key"] == str(event.data.ref)


def test_text_of_another_store_s_numbers_and_empty_text() -> None:
    change = only(parse(sample("ceph_put_size_as_text.json")))
    assert (change.size, change.version) == (1024, None)


def test_what_a_removal_describes_is_not_what_lies_there_now() -> None:
    change = only(parse(sample("aws_delete_marker.json")))
    assert change.removed
    assert (change.etag, change.put_time, change.size) == (None, None, None)


@pytest.mark.parametrize(
    ("source", "sequencer", "put_time"),
    [
        ("minio:s3", "1898B5E2F7C0A123", datetime(2026, 3, 1, 12, 0, 39, tzinfo=UTC)),
        ("rustfs:s3", "1898b5e2f7c0a123", datetime(2026, 3, 1, 12, 0, 39, tzinfo=UTC)),
        ("aws:s3", "1898B5E2F7C0A123", None),
        ("ceph:s3", "F7E6D75DC742D108", None),
        ("minio:s3", "0055AED6DCD90281E5", None),
        ("minio:s3", "", None),
        ("minio:s3", None, None),
        ("minio:s3", "1898B5E2F7C0A12G", None),
        ("minio:s3", "FFFFFFFFFFFFFFFF", datetime(2554, 7, 21, 23, 34, 33, tzinfo=UTC)),
    ],
)
def test_only_a_sequencer_that_is_the_object_s_own_time_is_a_put_time(
    source: str, sequencer: str | None, put_time: datetime | None
) -> None:
    assert only(parse(message(source, eTag="e", sequencer=sequencer))).put_time == put_time


def test_an_etag_is_without_quotes() -> None:
    assert only(parse(message(eTag='"abc"'))).etag == "abc"


def test_missing_size_etag_and_sequencer_are_not_known() -> None:
    change = only(parse(message()))
    assert (change.etag, change.size, change.put_time, change.version) == (None, None, None, None)


# -- what passes ---------------------------------------------------------------------------------------------------------
def test_other_buckets_are_counted_and_left_out() -> None:
    assert parse(sample("aws_several_records.json")).foreign == 1
    assert parse(message(bucket="Not a bucket's name!")) == Notification(foreign=1)


@pytest.mark.parametrize("name", ["s3:ObjectAccessed:Get", "ObjectAccessed:Head", "s3:Scanner:BigPrefix"])
def test_a_read_is_no_change_or_our_own_reads_would_announce_themselves_for_ever(name: str) -> None:
    assert parse(message(name=name)) == Notification(no_change=1)


def test_an_unheard_name_is_a_hint_like_the_rest() -> None:
    notification = parse(message(name="s3:ObjectInvented:Now"))
    assert notification.unknown_names == 1
    assert not only(notification).removed


@pytest.mark.parametrize(
    "name",
    [
        "ObjectRemoved:Delete",
        "s3:ObjectRemoved:DeleteAllVersions",
        "s3:ObjectRemoved:NoOP",
        "s3:LifecycleDelMarkerExpiration:Delete",
        "LifecycleExpiration:DeleteMarkerCreated",
        "ObjectLifecycle:Expiration:DeleteMarker",
    ],
)
def test_removals(name: str) -> None:
    assert only(parse(message(name=name))).removed


# -- ids -----------------------------------------------------------------------------------------------------------------
def test_the_same_notification_has_the_same_id_whichever_way_it_came() -> None:
    (direct,), (wrapped,) = (parse(sample(name)).events for name in ("aws_put.json", "sns_put.json"))
    assert direct == wrapped
    assert parse(sample("minio_put.json")) == parse(sample("minio_put.json"))


def test_different_notifications_have_different_ids() -> None:
    messages = [sample(name) for name in EXPECTED if name != "sns_put.json"]
    messages += [
        changed("minio_put.json", eventTime="2026-03-01T10:20:30.457Z"),
        changed("minio_put.json", eventName="s3:ObjectCreated:Copy"),
        message(versionId="1"),
        message(versionId="2"),
        message(bucket="other"),
    ]
    ids = [event.id for one in messages for event in parse(one).events]
    assert len(ids) == len(set(ids))


# -- keys ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.parametrize("source", ["minio:s3", "rustfs:s3", "aws:s3", "", "ceph:s3"])
def test_odd_keys_come_out_as_they_were_put(source: str, key: str) -> None:
    sent = key if source == "ceph:s3" else quote_plus(key)
    assert only(parse(message(source, key=sent))).key == key


@given(key=KEYS)
def test_a_form_encoded_key_comes_out_as_it_was_put(key: str) -> None:
    """MinIO encodes the slash, AWS does not; both encode the rest in the same way."""
    minio, aws = quote_plus(key), quote(key, safe="/").replace("%20", "+")
    assert only(parse(message("minio:s3", key=minio))).key == key
    assert only(parse(message("aws:s3", key=aws))).key == key


@given(key=KEYS)
def test_a_raw_key_is_left_as_it_is(key: str) -> None:
    assert only(parse(message("ceph:s3", key=key))).key == key


# -- what is no notification ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", ReasonCode.EVENT_NOT_JSON),
        (b"not json", ReasonCode.EVENT_NOT_JSON),
        (b"\xff\xfe", ReasonCode.EVENT_NOT_JSON),
        (sample("minio_put.json")[:-20], ReasonCode.EVENT_NOT_JSON),
        (b"[]", ReasonCode.EVENT_INVALID),
        (b"null", ReasonCode.EVENT_INVALID),
        (b"{}", ReasonCode.EVENT_INVALID),
        (b'{"Event": "something else"}', ReasonCode.EVENT_INVALID),
        (b'{"Records": null}', ReasonCode.EVENT_INVALID),
        (b'{"Records": [{}]}', ReasonCode.EVENT_INVALID),
        (b'{"Type": "Notification", "Message": "not json"}', ReasonCode.EVENT_NOT_JSON),
        (b'{"Type": "Notification", "Message": "{}"}', ReasonCode.EVENT_INVALID),
        (b'{"Type": "Notification", "Message": 1}', ReasonCode.EVENT_INVALID),
        (message(key=""), ReasonCode.EVENT_INVALID),
        (message(key="%FF%FE"), ReasonCode.EVENT_INVALID),
        (message("ceph:s3", key="\ud800"), ReasonCode.EVENT_NOT_JSON),
        (message(key="k" * 1025), ReasonCode.EVENT_INVALID),
        (message(size=-1), ReasonCode.EVENT_INVALID),
        (changed("minio_put.json", eventTime="yesterday"), ReasonCode.EVENT_INVALID),
        (changed("minio_put.json", eventTime="2026-03-01T10:20:30"), ReasonCode.EVENT_INVALID),
        (changed("minio_put.json", eventTime="9999-12-31T23:59:59-12:00"), ReasonCode.EVENT_INVALID),
    ],
)
def test_what_is_no_notification_is_refused(value: bytes, reason: ReasonCode) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse(value)
    assert caught.value.reason is reason


@given(value=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(value: bytes) -> None:
    with contextlib.suppress(InvalidEvent):
        parse(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_a_size_that_is_null_is_a_size_that_is_not_told() -> None:
    document = {
        "Records": [
            {
                "eventName": "s3:ObjectCreated:Put",
                "eventSource": "minio:s3",
                "eventTime": "2026-01-02T03:04:05.000Z",
                "s3": {"bucket": {"name": "images"}, "object": {"key": "a.jpg", "size": None}},
            }
        ]
    }
    (event,) = parse(json.dumps(document).encode()).events
    assert event.data.size is None


@given(data=st.data())
def test_any_damage_to_a_notification_is_read_or_refused(data: st.DataObject) -> None:
    document: dict[str, Any] = json.loads(sample("minio_put.json"))
    record = document["Records"][0]
    place = data.draw(st.sampled_from([document, record, record["s3"], record["s3"]["bucket"], record["s3"]["object"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    with contextlib.suppress(InvalidEvent):
        for event in parse(json.dumps(document).encode()).events:
            assert ObjectEvent.model_validate_json(event.to_json()) == event
