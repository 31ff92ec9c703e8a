"""Object events and outcomes, as CloudEvents 1.0 in JSON structured mode (https://github.com/cloudevents/spec).

Fields are added over time, never changed or removed: a reader ignores what it does not know.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from schemas.identity import ObjectId, ObjectRef

Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Cause(StrEnum):
    """Why an object event was written, from the weakest to the strongest.

    When several events for one object stand in a batch, the strongest cause wins: only a notification may be dropped as
    already known, so a repair that stands beside one must not be lost.
    """

    NOTIFICATION = "notification"
    METADATA = "metadata"
    SCAN = "scan"
    REINDEX = "reindex"
    RETRY = "retry"
    REPAIR = "repair"

    @property
    def strength(self) -> int:
        return list(Cause).index(self)


class OutcomeType(StrEnum):
    INDEXED = "image-search.image.indexed"
    UPDATED = "image-search.image.updated"
    DELETED = "image-search.image.deleted"
    FAILED = "image-search.image.failed"
    IGNORED = "image-search.image.ignored"
    DUPLICATE = "image-search.image.duplicate"


class ReasonCode(StrEnum):
    """Stable codes of what went wrong with an object or an event. Documented in docs/errors.md."""

    # The bytes: permanent until the object changes.
    EMPTY_OBJECT = "EMPTY_OBJECT"
    NOT_AN_IMAGE = "NOT_AN_IMAGE"
    UNSUPPORTED_FORMAT = "UNSUPPORTED_FORMAT"
    CORRUPT_IMAGE = "CORRUPT_IMAGE"
    IMAGE_TOO_SMALL = "IMAGE_TOO_SMALL"
    TOO_MANY_PIXELS = "TOO_MANY_PIXELS"
    OBJECT_TOO_LARGE = "OBJECT_TOO_LARGE"
    DECODE_TIMEOUT = "DECODE_TIMEOUT"
    DECODE_CRASHED = "DECODE_CRASHED"
    # The rules: not pictures by name, by kind.
    EXCLUDED_BY_RULE = "EXCLUDED_BY_RULE"
    DIRECTORY_MARKER = "DIRECTORY_MARKER"
    # The store while it is well: may pass, a scan tries them again.
    OBJECT_UNREADABLE = "OBJECT_UNREADABLE"
    ACCESS_DENIED = "ACCESS_DENIED"
    BUCKET_NOT_FOUND = "BUCKET_NOT_FOUND"
    # The event.
    EVENT_NOT_JSON = "EVENT_NOT_JSON"
    EVENT_INVALID = "EVENT_INVALID"
    EVENT_UNKNOWN_TYPE = "EVENT_UNKNOWN_TYPE"
    # Ourselves.
    INTERNAL_ERROR = "INTERNAL_ERROR"


RETRYABLE_REASONS = frozenset(
    {
        ReasonCode.OBJECT_UNREADABLE,
        ReasonCode.ACCESS_DENIED,
        ReasonCode.BUCKET_NOT_FOUND,
        ReasonCode.INTERNAL_ERROR,
        ReasonCode.DECODE_TIMEOUT,
        ReasonCode.DECODE_CRASHED,
    }
)
"""Failures that the same bytes may not meet again: a scan writes a retry event for them."""

OBJECT_CHANGED = "image-search.object.changed"
CONTENT_TYPE = "application/cloudevents+json"


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    specversion: Literal["1.0"] = "1.0"
    id: str = Field(min_length=1, max_length=128)
    source: str = Field(min_length=1, max_length=512)
    subject: str
    time: AwareDatetime
    datacontenttype: Literal["application/json"] = "application/json"

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode()


class ObjectChange(BaseModel):
    """A hint that a key may have changed. The bucket's present state decides what happens."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Names that S3 allows or once allowed. Anything else would be refused by the database's ASCII column for ever.
    bucket: str = Field(pattern=r"^[A-Za-z0-9._-]{1,63}$")
    key: str = Field(min_length=1, max_length=1024)
    cause: Cause
    removed: bool = False
    """The store said that the key went away. A hint like the rest."""
    etag: str | None = None
    version: str | None = None
    put_time: AwareDatetime | None = None
    """The store's Last-Modified of the object, in the store's resolution (whole seconds on S3)."""
    size: int | None = Field(default=None, ge=0)
    directory_marker: bool = False
    attempt: int = Field(default=1, ge=1)

    @property
    def ref(self) -> ObjectRef:
        return ObjectRef(self.bucket, self.key)

    @model_validator(mode="after")
    def _key_fits(self) -> Self:
        if len(self.key.encode("utf-8", "surrogatepass")) > 1024:
            raise ValueError("key is longer than 1024 bytes")
        return self


class ObjectEvent(_Event):
    """What the bridge writes to the `objects` topic. `time` is when it happened at the store, or when a scan saw it."""

    type: Literal["image-search.object.changed"] = "image-search.object.changed"
    data: ObjectChange


class Timings(BaseModel):
    """Milliseconds by step; `since_put` runs from the event's time at the store to the SQL commit."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    queued: float | None = None
    read: float | None = None
    decode: float | None = None
    embed: float | None = None
    write: float | None = None
    since_put: float | None = None


class Outcome(BaseModel):
    """What became of an object. A reader drops an outcome whose generation is below the last one it saw."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bucket: str
    key: str
    object_id: Hex64
    generation: int = Field(ge=1)
    cause: Cause
    etag: str | None = None
    version: str | None = None
    put_time: AwareDatetime | None = None
    size: int | None = None
    content_hash: Hex64 | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    model: str | None = None
    timings_ms: Timings | None = None
    duplicate_of: Hex64 | None = None
    reason: ReasonCode | None = None
    message: str | None = None
    attempt: int | None = None

    @property
    def ref(self) -> ObjectRef:
        return ObjectRef(self.bucket, self.key)


class OutcomeEvent(_Event):
    type: OutcomeType
    data: Outcome


def outcome_id(object_id: ObjectId, generation: int, kind: OutcomeType) -> str:
    """The same outcome has the same id however often it is delivered."""
    return hashlib.sha256(b"\0".join((object_id, str(generation).encode(), kind.encode()))).hexdigest()


def event_source(deployment: str, bucket: str) -> str:
    return f"/image-search/{deployment}/{bucket}"


def outcome_event(kind: OutcomeType, deployment: str, time: datetime, data: Outcome) -> OutcomeEvent:
    return OutcomeEvent(
        id=outcome_id(data.ref.object_id, data.generation, kind),
        source=event_source(deployment, data.bucket),
        subject=str(data.ref),
        time=time,
        type=kind,
        data=data,
    )


OutcomeEvents = TypeAdapter(list[OutcomeEvent])
"""The form in which a row keeps what it still owes its subscribers."""
