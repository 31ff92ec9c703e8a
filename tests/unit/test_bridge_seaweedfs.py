"""The parser of SeaweedFS's metadata log, held to what a real server printed (tests/data/seaweedfs)."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InvalidEvent
from ingest_bridge.meta_tail import DocumentSplitter
from ingest_bridge.notifications.seaweedfs import LogDocument, parse_document
from schemas.events import Cause, ObjectEvent, ReasonCode

DATA = Path(__file__).parent.parent / "data" / "seaweedfs"
HEADS: dict[str, dict[str, dict[str, Any] | None]] = json.loads((DATA / "heads.json").read_text())
BUCKETS = frozenset({"images", "other", "other2", "ver"})
LONG_KEY = "/".join(["k" * 200] * 5) + "/" + "j" * 19
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

EXPECTED = {
    "put": ["+images/a.jpg"],
    "overwrite": ["+images/a.jpg"],
    "tag": ["+images/a.jpg"],
    "untag": ["+images/a.jpg"],
    "metadata": ["+images/a.jpg"],
    "copy": ["+images/b.jpg"],
    "delete": ["-images/b.jpg"],
    "multi_delete": ["+images/md/1", "+images/md/2", "-images/md/1", "-images/md/2"],
    "multipart": ["+images/mp/big.bin"],
    "multipart_overwrite": ["+images/mp/big.bin"],
    "multipart_abort": [],
    "copy_multipart": ["+images/mp/copy.bin"],
    "zero_bytes": ["+images/zero.jpg"],
    "directory_marker": ["+images/dir/marker/"],
    "directory_marker_child": ["+images/dir/marker/c.jpg"],
    "directory_marker_delete": ["-images/dir/marker/"],
    "directory_marker_with_body": ["+images/dir/full/"],
    "key_space": ["+images/s p/a b.jpg"],
    "key_plus": ["+images/plus+a+b.jpg"],
    "key_percent": ["+images/pct%20a%2F.jpg"],
    "key_umlaut": ["+images/ä é/ö.jpg"],
    "key_japanese": ["+images/日本/写真.png"],
    "key_trailing_space": ["+images/trail .jpg "],
    "key_url_characters": ["+images/q?x#y&z=1.jpg"],
    "key_quotes": ["+images/quote'\"/b.jpg"],  # put as quote'"\b.jpg: the server takes a backslash for a slash
    "key_emoji": ["+images/emoji😀.jpg"],
    "key_tab": ["+images/new\tline.jpg"],
    "key_double_slash": ["+images/a/b.jpg"],  # put as a//b.jpg
    "key_upper_case": ["+images/A.jpg"],
    "key_control_character": ["+images/ctrl\x01x.jpg"],
    "key_angle_brackets": ["+images/<tag>.jpg"],
    "key_line_separator": ["+images/lsep\u2028x.jpg"],
    "key_1024_bytes": [f"+images/{LONG_KEY}"],
    "rename_object": ["-images/ren/one.jpg", "+images/ren/uno.jpg"],
    "rename_folder": [
        "-images/ren/sub/two.jpg",
        "+images/neu/sub/two.jpg",
        "-images/ren/uno.jpg",
        "+images/neu/uno.jpg",
    ],
    "filer_put": ["+images/viafiler.jpg"],
    "filer_delete_folder": ["-images/neu/sub/two.jpg", "-images/neu/uno.jpg"],
    "bucket_remove": ["-other/x", "-other/f/y"],
    "bucket_remove_filer": ["+other2/k/x.jpg", "-other2/k/x.jpg"],
    "versioned_bucket": ["+ver/d/a.jpg", "+ver/d/a.jpg", "-ver/d/a.jpg", "-ver/d/a.jpg"],
    "packed_while_catching_up": [
        "+images/ctrl\x01x.jpg",
        "+images/<tag>.jpg",
        "+images/lsep\u2028x.jpg",
        f"+images/{LONG_KEY}",
    ],
}


def documents_of(sample: str) -> list[bytes]:
    return DocumentSplitter().feed((DATA / f"{sample}.txt").read_bytes())


def parse(document: bytes) -> LogDocument:
    return parse_document(document, deployment="local", buckets=BUCKETS)


def events_of(sample: str) -> list[ObjectEvent]:
    """Each id once, as the follower has it."""
    found = [event for document in documents_of(sample) for event in parse(document).events]
    return list({event.id: event for event in found}.values())


def in_short(event: ObjectEvent) -> str:
    return f"{'-' if event.data.removed else '+'}{event.data.ref}"


def test_every_recording_has_its_expectation() -> None:
    assert {path.stem for path in DATA.glob("*.txt")} == set(EXPECTED)


@pytest.mark.parametrize("sample", EXPECTED)
def test_recorded_changes_become_object_events(sample: str) -> None:
    assert [in_short(event) for event in events_of(sample)] == EXPECTED[sample]


@pytest.mark.parametrize("sample", [name for name, heads in HEADS.items() if any(heads.values())])
def test_an_event_describes_the_object_as_s3_does(sample: str) -> None:
    last = {event.data.key: event.data for event in events_of(sample)}
    compared = 0
    for key, head in HEADS[sample].items():
        change = last.get(key)
        if head is None or change is None or change.removed:
            continue
        assert change.put_time == datetime.fromisoformat(head["last_modified"])
        assert change.etag == head["etag"]
        assert change.size == head["size"]
        compared += 1
    unnamed = {"key_quotes", "key_double_slash"}  # the server stores them under another key than was put
    assert compared or sample in unnamed or sample == "directory_marker_delete"


def test_tags_change_neither_etag_nor_put_time() -> None:
    [put] = events_of("overwrite")
    for sample in ("tag", "untag"):
        [tagged] = events_of(sample)
        assert (tagged.data.etag, tagged.data.put_time) == (put.data.etag, put.data.put_time)
        assert tagged.id != put.id


def test_a_metadata_change_moves_the_put_time() -> None:
    [put], [changed] = events_of("overwrite"), events_of("metadata")
    assert changed.data.etag == put.data.etag
    assert put.data.put_time and changed.data.put_time and changed.data.put_time > put.data.put_time


def test_markers_are_told_apart_from_objects() -> None:
    assert [event.data.directory_marker for event in events_of("directory_marker")] == [True]
    assert [event.data.directory_marker for event in events_of("directory_marker_child")] == [False]


def test_a_versioned_key_is_announced_without_what_belongs_to_one_version() -> None:
    for event in events_of("versioned_bucket"):
        assert event.data.etag is None
        assert event.data.put_time is None


def test_a_replay_repeats_the_ids() -> None:
    """What was recorded live is packed in the replay of the same moments."""
    live = {event.id: event for name in ("key_angle_brackets", "key_1024_bytes") for event in events_of(name)}
    replayed = {event.id: event for event in events_of("packed_while_catching_up")}
    assert len(live) == 2
    assert {event_id: replayed[event_id] for event_id in live} == live


def test_packed_entries_are_read_and_repeat_what_is_printed_after_them() -> None:
    first, *others = (parse(document) for document in documents_of("packed_while_catching_up"))
    assert len(others) == 9
    assert first.position_ns == max(other.position_ns for other in others)
    assert {event.id for event in first.events} >= {event.id for other in others for event in other.events}


def test_other_buckets_are_left_out() -> None:
    [document] = documents_of("put")
    assert parse_document(document, deployment="local", buckets={"other"}).events == ()


def test_the_event_is_of_the_time_in_the_log() -> None:
    [document] = documents_of("put")
    parsed = parse(document)
    [event] = parsed.events
    assert parsed.position_ns == 1795426102341220553
    assert event.time == EPOCH + timedelta(microseconds=1795426102341220)
    assert event.source == "/image-search/local/images"
    assert event.subject == "images/a.jpg"
    assert event.data.cause is Cause.NOTIFICATION


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", ReasonCode.EVENT_NOT_JSON),
        (b"{", ReasonCode.EVENT_NOT_JSON),
        (b"\xff\xfe", ReasonCode.EVENT_NOT_JSON),
        (b"[]", ReasonCode.EVENT_INVALID),
        (b"{}", ReasonCode.EVENT_INVALID),
        (b'{"directory": "/buckets/images", "tsNs": "0"}', ReasonCode.EVENT_INVALID),
        (b'{"directory": "/buckets/images", "tsNs": "soon"}', ReasonCode.EVENT_INVALID),
        (b'{"directory": "/buckets/images", "tsNs": "99999999999999999999999"}', ReasonCode.EVENT_INVALID),
    ],
)
def test_what_is_no_entry_is_refused(document: bytes, reason: ReasonCode) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse(document)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": None},
        {"attributes": {"mtime": "late"}},
        {"attributes": {"fileSize": "-1"}},
        {"attributes": {"mtime": "99999999999999"}},
        {"extended": {"Seaweed-X-Amz-ETag": "not base64!"}},
        {"extended": {"Seaweed-X-Amz-ETag": "/w=="}},
        {"name": "k" * 1025},
    ],
)
def test_an_entry_with_a_broken_field_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse(document_of("/buckets/images", new=entry("a.jpg") | change))
    assert caught.value.reason is ReasonCode.EVENT_INVALID


def entry(name: str, **changes: object) -> dict[str, Any]:
    return {
        "name": name,
        "isDirectory": False,
        "attributes": {"fileSize": "3", "mtime": "1795426102", "mime": "image/jpeg", "md5": ""},
        "extended": {"Seaweed-X-Amz-ETag": base64.b64encode(b"0123").decode()},
        **changes,
    }


def document_of(
    directory: str, *, old: dict[str, Any] | None = None, new: dict[str, Any] | None = None, parent: str = "", ts: int = 1
) -> bytes:
    notification = {"oldEntry": old, "newEntry": new, "newParentPath": parent or (directory if new else "")}
    return json.dumps({"directory": directory, "eventNotification": notification, "tsNs": str(ts)}).encode()


def test_an_entry_without_description_still_is_an_event() -> None:
    [event] = parse(document_of("/buckets/images", new={"name": "a", "attributes": None, "extended": None})).events
    assert (event.data.etag, event.data.put_time, event.data.size) == (None, None, 0)


def test_what_lies_in_a_folder_named_versions_is_an_object() -> None:
    [event] = parse(document_of("/buckets/images/my.versions", new=entry("v_1.jpg"))).events
    assert event.data.key == "my.versions/v_1.jpg"


def test_only_the_folder_at_the_top_holds_parts_of_uploads() -> None:
    [event] = parse(document_of("/buckets/images/a/.uploads", new=entry("b.jpg"))).events
    assert event.data.key == "a/.uploads/b.jpg"


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=40).filter(
    lambda name: name not in (".uploads", ".", "..") and not name.endswith(".versions")
)


@given(st.lists(NAMES, min_size=1, max_size=5), st.integers(1, 2**63 - 1), st.booleans())
def test_any_key_comes_through_as_it_is(names: list[str], ts_ns: int, is_removal: bool) -> None:
    *folders, name = names
    directory = "/".join(["/buckets/images", *folders])
    one = entry(name)
    document = document_of(directory, ts=ts_ns, old=one if is_removal else None, new=None if is_removal else one)
    parsed = parse(document)
    [event] = parsed.events
    assert parsed.position_ns == ts_ns
    assert event.data.key == "/".join(names)
    assert event.data.removed is is_removal
    assert parse(document).events[0].id == event.id
    assert ObjectEvent.model_validate_json(event.to_json()) == event


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: json.dumps({"directory": text, "tsNs": text}).encode()))
def test_nothing_but_a_clear_refusal_comes_of_noise(document: bytes) -> None:
    with contextlib.suppress(InvalidEvent):
        assert parse(document).events == ()


@given(st.lists(st.integers(0, 5000), max_size=30))
def test_documents_are_found_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    whole = (DATA / "multi_delete.txt").read_bytes()
    splitter = DocumentSplitter()
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    found = [document for start, end in itertools.pairwise(places) for document in splitter.feed(whole[start:end])]
    assert found == documents_of("multi_delete")
    assert [json.loads(document)["tsNs"] for document in found]


def test_the_childs_words_are_not_taken_for_documents() -> None:
    splitter = DocumentSplitter()
    stream = b'warming up\n\n{\n  "a": 1\n}\n{"b": 2}\ntail 127.0.0.1:8888: subscribing: EOF\n'
    assert [json.loads(document) for document in splitter.feed(stream)] == [{"a": 1}, {"b": 2}]
    assert splitter.last_words == "tail 127.0.0.1:8888: subscribing: EOF"


def test_a_document_that_is_too_long_is_cut_and_those_behind_it_are_whole() -> None:
    splitter = DocumentSplitter(most_bytes=100)
    long = b"{\n" + b'  "a": "' + b"x" * 30 + b'",\n' * 10 + b"}\n"
    cut, whole = splitter.feed(long[:50]) + splitter.feed(long[50:] + b'{\n  "b": 2\n}\n')
    assert len(cut) < 200
    with pytest.raises(InvalidEvent):
        parse(cut)
    assert json.loads(whole) == {"b": 2}


def test_a_line_without_an_end_does_not_grow() -> None:
    splitter = DocumentSplitter(most_bytes=1000)
    splitter.feed(b"{\n")
    for _ in range(100):
        assert splitter.feed(b" " * 500) == []
    [cut] = splitter.feed(b"\n}\n")
    assert len(cut) < 3000
