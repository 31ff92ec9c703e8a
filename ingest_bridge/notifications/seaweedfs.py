"""SeaweedFS: one document of its metadata log (`weed filer.meta.tail`) to object events.

The log speaks of files and folders of the filer, as they were before (`oldEntry`) and as they are after (`newEntry`). A key
is a path below `/buckets/<bucket>/`, in raw UTF-8. What was recorded from a real server lies in tests/data/seaweedfs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from infra.errors import InvalidEvent
from schemas.events import Cause, ObjectChange, ObjectEvent, ReasonCode, event_source
from schemas.identity import RESERVED_PREFIX, ObjectRef

BUCKETS_DIR = "/buckets/"

_UPLOADS = ".uploads"
_VERSIONS_SUFFIX = ".versions"
_ETAG = "Seaweed-X-Amz-ETag"
_VERSION_ID = "Seaweed-X-Amz-Version-Id"
_LATEST_VERSION_ID = "Seaweed-X-Amz-Latest-Version-Id"
_LATEST_IS_DELETE_MARKER = "Seaweed-X-Amz-Latest-Version-Is-Delete-Marker"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _absent_if_null(value: object) -> object:
    return {} if value is None else value


class _Message(BaseModel):
    """Protobuf as JSON: camel case, 64-bit numbers as text, a message that is not set as null."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True)


class _Attributes(_Message):
    file_size: int = Field(default=0, ge=0)
    mtime: int = 0
    mime: str = ""
    md5: str = ""


class _Entry(_Message):
    name: str = Field(min_length=1)
    is_directory: bool = False
    attributes: Annotated[_Attributes, BeforeValidator(_absent_if_null)] = _Attributes()
    extended: Annotated[dict[str, str], BeforeValidator(_absent_if_null)] = {}


class _Notification(_Message):
    old_entry: _Entry | None = None
    new_entry: _Entry | None = None
    new_parent_path: str = ""


class _LogEntry(_Message):
    directory: str
    event_notification: _Notification | None = None
    ts_ns: int = Field(gt=0, lt=2**63)


class _Document(_LogEntry):
    events: tuple[_LogEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class LogDocument:
    """`position_ns` is the time, in the log's own clock, up to which the log was read with this document."""

    position_ns: int
    events: tuple[ObjectEvent, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an entry is seen through S3. A versioned one only hints at its key: what it describes is not the key's object."""

    ref: ObjectRef
    directory_marker: bool = False
    versioned: bool = False


def parse_document(document: bytes, *, deployment: str, buckets: Collection[str]) -> LogDocument:
    """Object events of these buckets, in the order of the log. Raises InvalidEvent.

    While it catches up, the filer packs entries that wait into `events` of a first one. weed 4.48 prints each of them again
    on its own; nothing promises that, so they are read here, and the reader drops ids that it has seen.
    """
    try:
        parsed = _Document.model_validate_json(document)
        entries = (parsed, *parsed.events)
        events = tuple(event for entry in entries for event in _events_of(entry, deployment, buckets))
    except ValidationError as error:
        raise _invalid(error) from None
    except (binascii.Error, OverflowError, OSError, UnicodeError) as error:
        raise InvalidEvent(ReasonCode.EVENT_INVALID, f"not an entry of the log: {error}") from None
    return LogDocument(max(entry.ts_ns for entry in entries), events)


def _invalid(error: ValidationError) -> InvalidEvent:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidEvent(ReasonCode.EVENT_NOT_JSON, first["msg"])
    where = ".".join(map(str, first["loc"])) or "entry"
    return InvalidEvent(ReasonCode.EVENT_INVALID, f"{where}: {first['msg']}")


def _events_of(entry: _LogEntry, deployment: str, buckets: Collection[str]) -> Iterator[ObjectEvent]:
    notification = entry.event_notification
    if notification is None:
        return
    old, new = notification.old_entry, notification.new_entry
    old_place = _place(entry.directory, old) if old else None
    new_place = _place(notification.new_parent_path or entry.directory, new) if new else None
    # A rename is a removal here and a change there. A folder that stops being a marker is a removal as well.
    if old_place and (new_place is None or new_place.ref != old_place.ref) and old_place.ref.bucket in buckets:
        yield _event(entry, deployment, _removal(old_place))
    if new and new_place and new_place.ref.bucket in buckets:
        yield _event(entry, deployment, _change(new_place, new))


def _event(entry: _LogEntry, deployment: str, change: ObjectChange) -> ObjectEvent:
    kind = "removed" if change.removed else "changed"
    identity = f"seaweedfs\0{entry.ts_ns}\0{kind}\0{change.ref}".encode("utf-8", "surrogatepass")
    return ObjectEvent(
        id=hashlib.sha256(identity).hexdigest(),
        source=event_source(deployment, change.bucket),
        subject=str(change.ref),
        time=_EPOCH + timedelta(microseconds=entry.ts_ns // 1000),
        data=change,
    )


def _removal(place: _Place) -> ObjectChange:
    return ObjectChange(
        bucket=place.ref.bucket,
        key=place.ref.key,
        cause=Cause.NOTIFICATION,
        removed=True,
        directory_marker=place.directory_marker,
    )


def _change(place: _Place, entry: _Entry) -> ObjectChange:
    if place.versioned:
        # No ETag and no time: those would be of one version, and must not make a worker drop the event as known.
        return ObjectChange(
            bucket=place.ref.bucket,
            key=place.ref.key,
            cause=Cause.NOTIFICATION,
            removed=_LATEST_IS_DELETE_MARKER in entry.extended,
        )
    attributes = entry.attributes
    return ObjectChange(
        bucket=place.ref.bucket,
        key=place.ref.key,
        cause=Cause.NOTIFICATION,
        etag=_etag(entry),
        put_time=_EPOCH + timedelta(seconds=attributes.mtime) if attributes.mtime else None,
        size=attributes.file_size,
        directory_marker=place.directory_marker,
    )


def _etag(entry: _Entry) -> str | None:
    """The ETag that S3 answers with. What was put through the filer itself has none stored: S3 then answers its md5."""
    if stored := entry.extended.get(_ETAG):
        return base64.b64decode(stored, validate=True).decode("ascii").strip('"')
    if md5 := entry.attributes.md5:
        return base64.b64decode(md5, validate=True).hex()
    return None


def _place(directory: str, entry: _Entry) -> _Place | None:
    """None for reserved keys, and what S3 does not show: folders, parts of uploads, old versions, the filer's own files."""
    path = f"{directory.rstrip('/')}/{entry.name}"
    if not path.startswith(BUCKETS_DIR):
        return None
    bucket, _, key = path.removeprefix(BUCKETS_DIR).partition("/")
    if not bucket or not key or key.split("/", 1)[0] == _UPLOADS or key.startswith(RESERVED_PREFIX):
        return None
    if entry.is_directory:
        if key.endswith(_VERSIONS_SUFFIX) and _LATEST_VERSION_ID in entry.extended:
            return _Place(ObjectRef(bucket, key.removesuffix(_VERSIONS_SUFFIX)), versioned=True)
        # S3 shows a folder only if it was put as a key that ends in a slash. The filer keeps a media type for those alone.
        return _Place(ObjectRef(bucket, f"{key}/"), directory_marker=True) if entry.attributes.mime else None
    if directory.endswith(_VERSIONS_SUFFIX) and _VERSION_ID in entry.extended:
        return None
    return _Place(ObjectRef(bucket, key))
