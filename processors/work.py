"""What travels through the pipeline: a message as delivered, the work that it asks for, and what was found out about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from pydantic import ValidationError

from infra.errors import ImageSearchError, InvalidEvent
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.object_store.interface import ObjectStat
from infra.tracing import NO_SPAN, Span, trace_id_of
from schemas.events import OBJECT_CHANGED, Cause, ObjectChange, ObjectEvent, ReasonCode
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.vectors import Vector

MICROSECONDS = 1_000_000

IsOurs = Callable[[], bool]
"""Whether the partitions of a batch are still this worker's."""


class PartitionsRevoked(ImageSearchError):
    """A batch was dropped before it wrote anything: its events are delivered again, here or to another worker."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it came. Topic, partition and offset together are its identity. `span`: its part of a trace."""

    topic: str
    partition: int
    offset: int
    time_ms: int
    key: bytes
    value: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    span: Span = field(default=NO_SPAN, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done for one object.

    `must_write`: another writer moved the row on after we had written to Milvus. Our vector may stand there now, so nothing
    may be taken as known until a write of ours has passed the fence, or has been put right.
    """

    delivery: Delivery
    change: ObjectChange
    event_time: datetime
    must_write: bool = False

    @property
    def ref(self) -> ObjectRef:
        return self.change.ref

    @property
    def object_id(self) -> ObjectId:
        return self.change.ref.object_id

    def again(self) -> Work:
        return replace(self, must_write=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """The stores' knowledge of an object when work on it began. Every write starts from this generation."""

    row: ImageRow | None
    models: dict[ModelFingerprint, ContentHash] = field(default_factory=dict)

    @property
    def generation(self) -> int:
        return self.row.generation if self.row else 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What decoding tells about a picture, beside its pixels."""

    width: int
    height: int
    format: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Present, readable, with a vector of exactly these bytes of each model that is kept. `model`: the active one's name."""

    stat: ObjectStat
    content_hash: ContentHash
    md5: bytes
    facts: Facts
    vectors: Mapping[ModelFingerprint, Vector]
    model: str
    duplicate_of: ObjectId | None
    timings_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Failure:
    """Present, and no picture that can be indexed. `stat` is None when even that could not be had."""

    reason: ReasonCode
    message: str
    stat: ObjectStat | None
    content_hash: ContentHash | None = None


@dataclass(frozen=True, slots=True)
class Ignored:
    """Present, and no picture by rule."""

    reason: ReasonCode
    message: str
    stat: ObjectStat


@dataclass(frozen=True, slots=True)
class Gone:
    """The store is well and has nothing at this key."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The store is well, this object cannot be had. Says nothing about whether it exists, so nothing may be removed."""

    reason: ReasonCode
    message: str


Finding = Picture | Failure | Ignored | Gone | Unreachable


@dataclass(frozen=True, slots=True)
class Planned:
    """A finding with the write that follows from it; None: nothing is to be written (see RowMaker.write_for)."""

    work: Work
    finding: Finding
    write: RowWrite | None


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that is put aside, and why. `object_id`: what it was about, if that could be read."""

    delivery: Delivery
    reason: ReasonCode
    error: str
    attempt: int = 1
    object_id: ObjectId | None = None


def names_of(delivery: Delivery, object_id: ObjectId | None) -> dict[str, str]:
    """What a line of the log says of an event: its key, the name that all stores know its object by, and its own trace."""
    names = {"key": delivery.key.decode("utf-8", "replace")}
    if object_id is not None:
        names["object_id"] = object_id.hex()
    if (trace_id := trace_id_of(delivery.span)) is not None:
        names["trace_id"] = trace_id
    return names


def parse(delivery: Delivery) -> Work:
    """Raises InvalidEvent for what is no object event."""
    try:
        event = ObjectEvent.model_validate_json(delivery.value)
    except ValidationError as error:
        raise _invalid(error) from None
    return Work(delivery, event.data, event.time)


def _invalid(error: ValidationError) -> InvalidEvent:
    problems = error.errors(include_url=False, include_context=False, include_input=True)
    first = problems[0]
    if first["type"] == "json_invalid":
        return InvalidEvent(ReasonCode.EVENT_NOT_JSON, "the message is not JSON")
    place = ".".join(map(str, first["loc"])) or "the message"
    if first["loc"] == ("type",) and first["type"] == "literal_error":
        return InvalidEvent(ReasonCode.EVENT_UNKNOWN_TYPE, f"only {OBJECT_CHANGED} is known here")
    return InvalidEvent(ReasonCode.EVENT_INVALID, f"{place}: {first['msg']}")


def collapse(works: Iterable[Work]) -> list[Work]:
    """Of several events for one object the last stands, with the strongest cause of all of them.

    Were the cause of the last taken, a repair followed by a doubled notification would be dropped as already known. And when
    they tell different states, the last need not be the newest (stores reorder): then none may be dropped as known, or an
    old notification that comes late would take the new one with it.
    """
    last: dict[ObjectId, Work] = {}
    for work in works:
        before = last.pop(work.object_id, None)
        last[work.object_id] = work if before is None else _merged(before, work)
    return list(last.values())


def _merged(before: Work, work: Work) -> Work:
    one, other = before.change, work.change
    update: dict[str, object] = {
        "cause": max(one.cause, other.cause, key=lambda cause: cause.strength),
        "attempt": max(one.attempt, other.attempt),
    }
    if (one.etag, one.put_time, one.removed) != (other.etag, other.put_time, other.removed):
        update |= {"etag": None, "put_time": None}
    return replace(work, change=other.model_copy(update=update))


def is_known(work: Work, seen: Seen, models: Collection[ModelFingerprint]) -> bool:
    """Whether the row already says what this event announces, of every one of `models`: where doubled notifications end.

    Times compare in whole seconds, the resolution in which a store tells an object's time when it is read.
    """
    row, change = seen.row, work.change
    if row is None or work.must_write or change.cause is not Cause.NOTIFICATION or change.removed:
        return False
    if not row.is_published or row.state == "deleted" or change.etag is None or change.put_time is None:
        return False
    if change.etag != row.etag or row.put_time_us is None:
        return False
    if int(change.put_time.timestamp()) != row.put_time_us // MICROSECONDS:
        return False
    return row.state != "indexed" or all(seen.models.get(model) == row.content_hash for model in models)
