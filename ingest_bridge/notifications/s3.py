"""S3 bucket notifications to object events: MinIO, RustFS, AWS S3 (also wrapped by SNS) and Ceph RGW.

All send `Records` of one shape and differ in details that corrupt keys when they are taken for one another: MinIO, RustFS and
AWS form-encode the key (a space is `+`), Ceph RGW sends it as it is. Decoded twice, or where nothing was encoded, `a+b.jpg`
becomes the key of another object. The name of an event never decides anything: a tag is announced as a creation, a version
as a removal, so each is a hint to look. Samples lie in tests/data/notifications.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import unquote_plus

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from infra.errors import InvalidEvent
from schemas.events import Cause, ObjectChange, ObjectEvent, ReasonCode, event_source

RAW_KEY_SOURCES = frozenset({"ceph:s3"})
"""Stores whose keys are not encoded. All others form-encode them."""
MOD_TIME_SOURCES = frozenset({"minio:s3", "rustfs:s3"})
"""Stores whose sequencer is the object's own time: nanoseconds since 1970 as 16 hexadecimal digits."""

_MOD_TIME = re.compile(r"[0-9A-Fa-f]{16}")
_REMOVALS = ("ObjectRemoved:", "LifecycleDelMarkerExpiration:", "LifecycleExpiration:", "ObjectLifecycle:Expiration:")
_CHANGES = (
    "ObjectCreated:",
    "ObjectRestore:",
    "ObjectTagging:",
    "ObjectAcl:",
    "ObjectSynced:",
    "ObjectTransition:",
    "ObjectLifecycle:Transition:",
    "Replication:",
    "LifecycleTransition",
    "IntelligentTiering",
    "ReducedRedundancyLostObject",
)
# A read is announced too, if someone subscribes to it: passed on, our own read of the object would announce the next.
_NO_CHANGES = ("ObjectAccessed:", "Scanner:")
_SNS_WITHOUT_RECORDS = ("SubscriptionConfirmation", "UnsubscribeConfirmation")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _absent_if_empty(value: object) -> object:
    return None if value == "" else value


OptionalText = Annotated[str | None, BeforeValidator(_absent_if_empty)]


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True)


class _Bucket(_Part):
    name: str = Field(min_length=1)


class _Object(_Part):
    key: str = Field(min_length=1)
    size: Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_absent_if_empty)] = None
    e_tag: OptionalText = None
    version_id: OptionalText = None
    sequencer: OptionalText = None


class _Entity(_Part):
    bucket: _Bucket
    object: _Object


class _Record(_Part):
    event_source: str = ""
    event_name: str = Field(min_length=1)
    event_time: AwareDatetime
    s3: _Entity


class _Records(BaseModel):
    records: tuple[_Record, ...] = Field(alias="Records")


class _TestMessage(BaseModel):
    """What AWS sends when somebody sets a bucket's rules: a message without records."""

    event: Literal["s3:TestEvent"] = Field(alias="Event")


_JSON = TypeAdapter(dict[str, Any])


@dataclass(frozen=True, slots=True)
class Notification:
    """What one message says. `unknown_names` counts events of unheard names, passed on: the bucket's state decides anyway.

    Left out are records of buckets that are not followed (`foreign`), those that tell of no change, and those of reserved keys.
    """

    events: tuple[ObjectEvent, ...] = ()
    unknown_names: int = 0
    foreign: int = 0
    no_change: int = 0
    reserved: int = 0


def parse_message(message: bytes, *, deployment: str, buckets: Collection[str], reserved: bool = False) -> Notification:
    """Object events of these buckets, in the order of the message. Raises InvalidEvent. Pure.

    The same notification, delivered again or by another way, gives events with the same ids. `reserved`: instead of all other
    keys, those that are reserved for ourselves.
    """
    try:
        records = _records(_JSON.validate_json(message))
        followed = [record for record in records if record.s3.bucket.name in buckets]
        changed = [record for record in followed if not _kind(record).startswith(_NO_CHANGES)]
        found = [_event(record, deployment) for record in changed]
        events = tuple(event for event in found if event.data.ref.is_reserved is reserved)
    except ValidationError as error:
        raise _invalid(error) from None
    except UnicodeDecodeError:
        raise InvalidEvent(ReasonCode.EVENT_INVALID, "key: its encoded bytes are not UTF-8") from None
    except OverflowError:
        raise InvalidEvent(ReasonCode.EVENT_INVALID, "eventTime: not a time that UTC can tell") from None
    return Notification(
        events,
        unknown_names=sum(not _kind(record).startswith((*_REMOVALS, *_CHANGES)) for record in changed),
        foreign=len(records) - len(followed),
        no_change=len(followed) - len(changed),
        reserved=len(found) - len(events),
    )


def _records(document: dict[str, Any]) -> tuple[_Record, ...]:
    if document.get("Type") in _SNS_WITHOUT_RECORDS:
        return ()
    if document.get("Type") == "Notification" and isinstance(document.get("Message"), str):
        document = _JSON.validate_json(document["Message"])
    if "Records" not in document and "Event" in document:
        _TestMessage.model_validate(document)
        return ()
    return _Records.model_validate(document).records


def _invalid(error: ValidationError) -> InvalidEvent:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidEvent(ReasonCode.EVENT_NOT_JSON, first["msg"])
    where = ".".join(map(str, first["loc"])) or "the message"
    return InvalidEvent(ReasonCode.EVENT_INVALID, f"{where}: {first['msg']}")


def _kind(record: _Record) -> str:
    """The event's name as AWS writes it; others put `s3:` before it."""
    return record.event_name.removeprefix("s3:")


def _key(record: _Record) -> str:
    key = record.s3.object.key
    return key if record.event_source in RAW_KEY_SOURCES else unquote_plus(key, errors="strict")


def _event(record: _Record, deployment: str) -> ObjectEvent:
    change = _change(record)
    return ObjectEvent(
        id=_id(record, change),
        source=event_source(deployment, change.bucket),
        subject=str(change.ref),
        time=record.event_time,
        data=change,
    )


def _change(record: _Record) -> ObjectChange:
    described = record.s3.object
    key = _key(record)
    removed = _kind(record).startswith(_REMOVALS)
    # A removal may name a version, or a marker: what it describes is not what lies at the key now.
    return ObjectChange(
        bucket=record.s3.bucket.name,
        key=key,
        cause=Cause.NOTIFICATION,
        removed=removed,
        etag=described.e_tag.strip('"') if described.e_tag and not removed else None,
        version=described.version_id,
        put_time=None if removed else _put_time(record),
        size=None if removed else described.size,
        directory_marker=key.endswith("/"),
    )


def _put_time(record: _Record) -> datetime | None:
    """In whole seconds, as Last-Modified tells it. None where the store does not say: the event's time is not the object's.

    A worker drops a notification as known only if it tells a put time, so None costs a read of the object and no more.
    """
    sequencer = record.s3.object.sequencer or ""
    if record.event_source not in MOD_TIME_SOURCES or not _MOD_TIME.fullmatch(sequencer):
        return None
    try:
        return _EPOCH + timedelta(seconds=int(sequencer, 16) // 1_000_000_000)
    except OverflowError:
        return None


def _id(record: _Record, change: ObjectChange) -> str:
    described = record.s3.object
    parts = (
        "s3",
        record.event_source,
        record.event_time.astimezone(UTC).isoformat(),
        _kind(record),
        str(change.ref),
        described.version_id or "",
        described.e_tag or "",
        described.sequencer or "",
    )
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
