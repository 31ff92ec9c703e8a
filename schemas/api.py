"""The HTTP API of the query service: parameters, answers, and the one error shape with its stable codes.

Fields are added over time, never changed or removed. Times are UTC, ids and hashes lower-case hex, timings milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, Json

from schemas.events import Hex64, OutcomeEvent, OutcomeType, ReasonCode
from schemas.filter import BucketName, Filter, FilterGroup, Place, checked_key, within_bounds
from schemas.identity import ObjectId, object_id_from_hex
from schemas.tables import RowState

LARGEST_LIMIT = 1000
"""Most hits of a search and most entries of a page."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ErrorCode(StrEnum):
    """What clients branch on. A code keeps its meaning and its status for ever; new ones may be added."""

    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_ID = "INVALID_ID"
    INVALID_CURSOR = "INVALID_CURSOR"
    INVALID_WAIT_FOR = "INVALID_WAIT_FOR"
    INVALID_FILTER = "INVALID_FILTER"
    INVALID_VECTOR = "INVALID_VECTOR"
    INVALID_KEY = "INVALID_KEY"
    INVALID_METADATA = "INVALID_METADATA"
    INVALID_BODY = "INVALID_BODY"
    MISSING_IMAGE = "MISSING_IMAGE"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    ROUTE_NOT_FOUND = "ROUTE_NOT_FOUND"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    CONTENT_NOT_FOUND = "CONTENT_NOT_FOUND"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    BUCKET_NOT_FOLLOWED = "BUCKET_NOT_FOLLOWED"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    BODY_TIMEOUT = "BODY_TIMEOUT"
    IMAGE_NOT_INDEXED = "IMAGE_NOT_INDEXED"
    MODEL_CHANGE_REFUSED = "MODEL_CHANGE_REFUSED"
    CURSOR_EXPIRED = "CURSOR_EXPIRED"
    LENGTH_REQUIRED = "LENGTH_REQUIRED"
    PRECONDITION_FAILED = "PRECONDITION_FAILED"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    UNSUPPORTED_CONTENT_ENCODING = "UNSUPPORTED_CONTENT_ENCODING"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    TOO_MANY_READERS = "TOO_MANY_READERS"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    STORE_REFUSED = "STORE_REFUSED"
    WAIT_TIMEOUT = "WAIT_TIMEOUT"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    # What a picture sent to be searched for is refused with: the code that an object in a bucket would fail with.
    EMPTY_OBJECT = ReasonCode.EMPTY_OBJECT.value
    NOT_AN_IMAGE = ReasonCode.NOT_AN_IMAGE.value
    UNSUPPORTED_FORMAT = ReasonCode.UNSUPPORTED_FORMAT.value
    CORRUPT_IMAGE = ReasonCode.CORRUPT_IMAGE.value
    IMAGE_TOO_SMALL = ReasonCode.IMAGE_TOO_SMALL.value
    TOO_MANY_PIXELS = ReasonCode.TOO_MANY_PIXELS.value
    OBJECT_TOO_LARGE = ReasonCode.OBJECT_TOO_LARGE.value
    DECODE_TIMEOUT = ReasonCode.DECODE_TIMEOUT.value
    DECODE_CRASHED = ReasonCode.DECODE_CRASHED.value

    @property
    def status(self) -> int:
        return _STATUS[self]


_STATUS = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.INVALID_ID: 400,
    ErrorCode.INVALID_CURSOR: 400,
    ErrorCode.INVALID_WAIT_FOR: 400,
    ErrorCode.INVALID_FILTER: 400,
    ErrorCode.INVALID_VECTOR: 400,
    ErrorCode.INVALID_KEY: 400,
    ErrorCode.INVALID_METADATA: 400,
    ErrorCode.INVALID_BODY: 400,
    ErrorCode.MISSING_IMAGE: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.ROUTE_NOT_FOUND: 404,
    ErrorCode.IMAGE_NOT_FOUND: 404,
    ErrorCode.CONTENT_NOT_FOUND: 404,
    ErrorCode.JOB_NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.BUCKET_NOT_FOLLOWED: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.BODY_TIMEOUT: 408,
    ErrorCode.IMAGE_NOT_INDEXED: 409,
    ErrorCode.MODEL_CHANGE_REFUSED: 409,
    ErrorCode.CURSOR_EXPIRED: 410,
    ErrorCode.LENGTH_REQUIRED: 411,
    ErrorCode.PRECONDITION_FAILED: 412,
    ErrorCode.BODY_TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.UNSUPPORTED_CONTENT_ENCODING: 415,
    ErrorCode.TOO_MANY_REQUESTS: 429,
    ErrorCode.TOO_MANY_READERS: 429,
    ErrorCode.STORE_UNAVAILABLE: 503,
    ErrorCode.STORE_REFUSED: 503,
    ErrorCode.WAIT_TIMEOUT: 504,
    ErrorCode.INTERNAL_ERROR: 500,
    ErrorCode.EMPTY_OBJECT: 422,
    ErrorCode.NOT_AN_IMAGE: 415,
    ErrorCode.UNSUPPORTED_FORMAT: 415,
    ErrorCode.CORRUPT_IMAGE: 422,
    ErrorCode.IMAGE_TOO_SMALL: 422,
    ErrorCode.TOO_MANY_PIXELS: 413,
    ErrorCode.OBJECT_TOO_LARGE: 413,
    ErrorCode.DECODE_TIMEOUT: 422,
    ErrorCode.DECODE_CRASHED: 422,
}


class ErrorDetail(BaseModel):
    code: ErrorCode
    message: str = Field(description="For people: what is wrong and what to do.")
    details: dict[str, Any] = Field(default_factory=dict)
    request_id: str = Field(description="Also in the header X-Request-Id, and in the service's log.")


class ErrorAnswer(BaseModel):
    error: ErrorDetail


# -- parameters ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class WaitToken:
    """The state of an object that an answer must not be older than: the ETag of a put, or that it was deleted (None)."""

    object_id: ObjectId
    etag: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`<object id>:<etag>` or `<object id>:deleted`. Raises ValueError."""
        found = re.fullmatch(r'([0-9a-f]{64}):"?([^"\s]{1,255})"?', text)
        if found is None:
            raise ValueError("wait_for is <object id, 64 hex characters>:<etag> or <object id>:deleted")
        etag = found[2]
        return cls(object_id_from_hex(found[1]), None if etag == "deleted" else etag)

    def __str__(self) -> str:
        return f"{self.object_id.hex()}:{self.etag or 'deleted'}"


Prefix = Annotated[str, Field(max_length=1024), AfterValidator(checked_key)]
Limit = Annotated[int, Field(ge=1, le=LARGEST_LIMIT)]
LARGEST_WINDOW = 16_384
"""Offset and limit together: the vector store finds no more than that of one search."""

Offset = Annotated[int, Field(ge=0, le=LARGEST_WINDOW, description="Hits to leave out at the beginning.")]
Include = Literal["metadata", "duplicates", "presigned_url"]
Box = tuple[float, float, float, float]


def checked_box(box: Box) -> Box:
    """Raises ValueError for one that holds nothing."""
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError("a box is left, top, right, bottom, each in [0, 1], with left < right and top < bottom")
    return box


WaitFor = Annotated[
    str, Field(max_length=322, description="Wait until this state of an object is settled: `<id>:<etag>` or `<id>:deleted`.")
]


class Parameters(BaseModel):
    """Names that are not known are refused: a misspelt filter must not turn into no filter."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Narrowed(Parameters):
    bucket: BucketName | None = Field(None, description="Only this bucket.")
    prefix: Prefix = Field("", description="Only keys that start with this, compared byte by byte.")

    @property
    def place(self) -> Place:
        return Place(self.bucket, self.prefix)


FILTER_EXAMPLES: list[Any] = [
    {"must": [{"field": "width", "range": {"gte": 1920}}, {"field": "format", "match": {"any": ["png", "webp"]}}]},
    {
        "should": [{"field": "key", "match": {"prefix": "2025/"}}, {"field": "key", "match": {"prefix": "2026/"}}],
        "must_not": [{"field": "put_time", "range": {"lt": "2025-06-01T00:00:00Z"}}],
    },
]


class Filtered(_Narrowed):
    filter: Annotated[Json[FilterGroup], AfterValidator(within_bounds)] | None = Field(
        None, description="Only what this matches, besides `bucket` and `prefix`.", examples=FILTER_EXAMPLES
    )

    @property
    def narrow(self) -> Filter:
        return Filter(self.bucket, self.prefix, self.filter)


def _names(value: object) -> object:
    return {part for part in value.split(",") if part} if isinstance(value, str) else value


class SimilarParameters(Filtered):
    limit: Limit | None = Field(None, description="Most hits; the service's default when absent.")
    min_score: float | None = Field(
        None, ge=-100, le=100, allow_inf_nan=False, description="Only hits with this score or more."
    )
    max_distance: float | None = Field(None, ge=0, le=4, allow_inf_nan=False, description="Only hits at this distance or less.")
    offset: Offset = 0
    group_by: Literal["content_hash"] | None = Field(None, description="Of hits with the same bytes only the best.")
    include: Annotated[frozenset[Include], BeforeValidator(_names, json_schema_input_type=str)] = Field(
        frozenset(), description="More about each hit, comma-separated: `metadata`, `duplicates`, `presigned_url`."
    )
    model: str | None = Field(
        None, min_length=1, max_length=64, description="A model beside the active one, by name or fingerprint's beginning."
    )


class SearchParameters(SimilarParameters):
    wait_for: WaitFor | None = None
    box: Annotated[Json[Box], AfterValidator(checked_box)] | None = Field(
        None,
        description="Of the picture only this part: left, top, right, bottom as shares of the upright picture.",
        examples=[[0.1, 0.2, 0.6, 0.9]],
    )


class ImageParameters(Parameters):
    wait_for: WaitFor | None = None


class ListParameters(Filtered):
    limit: Limit | None = Field(None, description="Most entries of a page; the service's default when absent.")
    state: RowState | None = Field(None, description="Only objects in this state.")
    cursor: str | None = Field(None, max_length=4096, description="`next` of the page before.")


def _types(value: object) -> object:
    """`indexed,deleted`, short or in full, into a set of outcome types."""
    if not isinstance(value, str):
        return value
    return {part if "." in part else f"image-search.image.{part}" for part in value.split(",") if part}


LONGEST_EVENT_WAIT_SECONDS = 60


class EventParameters(Filtered):
    cursor: str | None = Field(
        None, max_length=8192, description="The id of the last message seen, or `earliest` for everything that is kept."
    )
    type: Annotated[frozenset[OutcomeType], BeforeValidator(_types, json_schema_input_type=str)] = Field(
        frozenset(), description="Only these types, comma-separated, short (`indexed`) or in full."
    )
    follow: bool = Field(True, description="false: end the stream when everything that was there at its start was sent.")
    wait: int | None = Field(
        None,
        ge=0,
        le=LONGEST_EVENT_WAIT_SECONDS,
        description="Answer with a page in JSON instead of a stream: at once if there is something, else when something "
        "comes, and empty after so many seconds. `Accept: application/json` does the same and does not wait.",
    )
    limit: Limit | None = Field(None, description="Most events of a page in JSON; the service's default when absent.")


# -- answers -------------------------------------------------------------------------------------------------------------
class Hit(BaseModel):
    id: Hex64
    bucket: str
    key: str
    score: float = Field(description="100 × cosine: 100 is the same, can be below 0.")
    distance: float = Field(description="Squared L2 of unit vectors: 0 is the same, 4 the opposite.")
    content_hash: Hex64
    size: int | None
    width: int | None
    height: int | None
    format: str | None
    put_time: AwareDatetime | None
    indexed_at: AwareDatetime
    url: str = Field(description="Path of the picture's bytes on this service.")
    metadata: dict[str, Any] | None = Field(None, description="What people say of it; with `include=metadata`.")
    duplicates: int | None = Field(
        None, description="How many other indexed objects have the same bytes; with `include=duplicates`."
    )
    presigned_url: str | None = Field(
        None, description="Where the object store gives its bytes for some minutes; with `include=presigned_url`."
    )


class SearchTimings(BaseModel):
    decode: float | None = None
    embed: float | None = None
    search: float
    metadata: float


class SearchAnswer(BaseModel):
    hits: list[Hit] = Field(description="Best first.")
    limit: int
    offset: int = 0
    groups_exhausted: bool | None = Field(
        None, description="With `group_by`: whether there are no further groups. Null without."
    )
    total_is_exact: bool = Field(False, description="A nearest-neighbour search has no exact total.")
    model: str
    indexed_through: AwareDatetime | None = Field(
        description="Everything that the object store handed over up to here is findable; null when not known."
    )
    lag_ms: int | None = Field(description="How long ago `indexed_through` was.")
    timing_ms: SearchTimings


class Image(BaseModel):
    id: Hex64
    bucket: str
    key: str
    state: RowState
    reason: ReasonCode | None = Field(description="Why it failed or is ignored.")
    message: str | None
    content_hash: Hex64 | None
    etag: str | None
    version: str | None
    size: int | None
    width: int | None
    height: int | None
    format: str | None
    put_time: AwareDatetime | None
    updated_at: AwareDatetime
    generation: int
    attempt: int
    url: str
    metadata: dict[str, Any] | None = Field(None, description="What people say of it; null in a list.")


class MetadataAnswer(BaseModel):
    id: Hex64
    metadata: dict[str, Any] = Field(description="The whole, with the patch in it.")


class Accepted(BaseModel):
    """A change that is in the bucket, and on its way to the index."""

    id: Hex64
    bucket: str
    key: str
    etag: str | None = Field(description="Of what was put; null for what was deleted.")
    wait_for: str = Field(description="What a search or GET /v1/images/{id} waits for with its parameter `wait_for`.")


class ImagePage(BaseModel):
    images: list[Image] = Field(description="In the byte order of bucket and key.")
    limit: int
    next: str | None = Field(description="Cursor of the next page; null on the last.")


class EventPage(BaseModel):
    """In the order of the topic: events of one object in the order in which they happened."""

    events: list[OutcomeEvent] = Field(
        description="As they were published. Readers pass over fields and types they do not know."
    )
    cursor: str = Field(description="Ask for the next page with it, also when this one is empty.")
    more: bool = Field(description="Whether there is more already, so that the next page will not be waited for.")


class TopicLag(BaseModel):
    pending: int = Field(description="Events written and not yet worked on.")
    partitions: int


class ModelStatus(BaseModel):
    name: str
    fingerprint: str
    dimension: int
    backend: str
    precision: str
    collection: str


class FreshnessStatus(BaseModel):
    indexed_through: AwareDatetime | None
    lag_ms: int | None
    reason: str | None = Field(description="Why the value is not known or does not advance; null when all is well.")


class Status(BaseModel):
    deployment: str
    buckets: list[str]
    images: dict[RowState, int]
    lag: dict[str, TopicLag]
    model: ModelStatus
    freshness: FreshnessStatus
    versions: dict[str, str]


class Liveness(BaseModel):
    status: str = "ok"


class Readiness(BaseModel):
    ready: bool
    components: dict[str, str] = Field(description="`ok`, or in a few words what is wrong.")


def time_of_us(microseconds: int) -> datetime:
    """Microseconds since 1970-01-01 UTC as a time, without the rounding of a float."""
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds_of(time: datetime) -> int:
    """The other way round."""
    return (time - _EPOCH) // timedelta(microseconds=1)
