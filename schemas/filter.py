"""The one filter language: what a search or a list is narrowed to.

`matches` is its meaning. infra/metadata_store/narrowing.py says the same in SQL, infra/vector_store/expression.py to Milvus;
tests/contract/test_filter.py holds the three equal. What is not known of an object matches no condition: a failed row has no
width, so `width < 100` leaves it out, and under `must_not` it stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from schemas.identity import ContentHash, ObjectRef

DEEPEST_GROUP = 5
MOST_CLAUSES = 64
MOST_VALUES = 256
"""Bounds of one filter as a whole: groups inside groups; conditions and groups together; values of every `any` together."""

LARGEST_KEY_BYTES = 1024
LARGEST_NUMBER = 2**63 - 1

FieldName = Literal["bucket", "key", "content_hash", "put_time", "size", "width", "height", "format"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE)


# -- what is filtered ------------------------------------------------------------------------------------------------------
class Described(Protocol):
    """What a filter looks at. Rows and vectors have it."""

    @property
    def ref(self) -> ObjectRef: ...
    @property
    def content_hash(self) -> ContentHash | None: ...
    @property
    def put_time_us(self) -> int | None: ...
    @property
    def size(self) -> int | None: ...
    @property
    def width(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...
    @property
    def format(self) -> str | None: ...


_VALUE_OF: Mapping[FieldName, Callable[[Described], str | int | bytes | None]] = {
    "bucket": attrgetter("ref.bucket"),
    "key": attrgetter("ref.key"),
    "content_hash": attrgetter("content_hash"),
    "put_time": attrgetter("put_time_us"),
    "size": attrgetter("size"),
    "width": attrgetter("width"),
    "height": attrgetter("height"),
    "format": attrgetter("format"),
}


# -- what a condition asks of a field: all that a translator has to know ---------------------------------------------------
@dataclass(frozen=True, slots=True)
class OneOf:
    """Content hashes are bytes."""

    values: tuple[Any, ...]

    def accepts(self, value: str | int | bytes) -> bool:
        return value in self.values


@dataclass(frozen=True, slots=True)
class StartsWith:
    """Byte by byte, which for Unicode text is the same as character by character."""

    prefix: str

    def accepts(self, value: str | int | bytes) -> bool:
        return isinstance(value, str) and value.startswith(self.prefix)


@dataclass(frozen=True, slots=True)
class Between:
    """Times are microseconds since 1970-01-01 UTC."""

    gt: int | None = None
    gte: int | None = None
    lt: int | None = None
    lte: int | None = None

    def accepts(self, value: str | int | bytes) -> bool:
        return (
            isinstance(value, int)
            and (self.gt is None or value > self.gt)
            and (self.gte is None or value >= self.gte)
            and (self.lt is None or value < self.lt)
            and (self.lte is None or value <= self.lte)
        )


Test: TypeAlias = OneOf | StartsWith | Between


# -- values in JSON --------------------------------------------------------------------------------------------------------
def checked_key(text: str) -> str:
    # NUL parts bucket and key inside an object id, and no store takes it in a key.
    if "\0" in text:
        raise PydanticCustomError("nul", "must not contain NUL")
    if len(text.encode("utf-8", "surrogatepass")) > LARGEST_KEY_BYTES:
        raise PydanticCustomError("too_long", "must not be longer than {bytes} bytes", {"bytes": LARGEST_KEY_BYTES})
    return text


def _checked_time(value: object) -> object:
    """The library would take seconds since 1970 as well, and cut what no store can hold."""
    if not isinstance(value, datetime) and not (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        raise PydanticCustomError("time", "must be a time such as 2026-01-31T12:00:00Z, of six decimals at most")
    return value


BucketName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9][a-z0-9.-]*$")]
KeyText = Annotated[str, Field(min_length=1, max_length=LARGEST_KEY_BYTES), AfterValidator(checked_key)]
HashText = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Rows have it as the decoder names it, in capitals.
FormatName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]{1,16}$", to_upper=True)]
Number = Annotated[int, Field(ge=0, le=LARGEST_NUMBER)]
Time = Annotated[AwareDatetime, BeforeValidator(_checked_time), Field(strict=False)]

Value = TypeVar("Value")


# -- the language in JSON --------------------------------------------------------------------------------------------------
def _as_list(most: int) -> Callable[[dict[str, Any]], None]:
    """For the description of a list that is left out or has something in it."""

    def describe(schema: dict[str, Any]) -> None:
        schema.pop("default", None)
        schema.update(minItems=1, maxItems=most)

    return describe


class _Part(BaseModel):
    """Strict: a number in quotes is not a number, and a misspelt name must not turn into no condition."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Of these fields exactly one is given, or at least one.
    one_of: ClassVar[tuple[str, ...]] = ()
    some_of: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        for name in self.model_fields_set:
            if getattr(self, name) == ():
                raise PydanticCustomError("empty", "has an empty list: {name}", {"name": name})
        names = self.one_of or self.some_of
        given = sum(getattr(self, name) not in (None, ()) for name in names)
        if (names and not given) or (self.one_of and given > 1):
            amount = "exactly one" if self.one_of else "at least one"
            raise PydanticCustomError("choice", "needs {amount} of: {names}", {"amount": amount, "names": ", ".join(names)})
        return self


class _Match(_Part, Generic[Value]):
    one_of: ClassVar[tuple[str, ...]] = ("value", "any")

    value: Value | None = Field(None, description="Equal to this.")
    any: tuple[Value, ...] = Field((), json_schema_extra=_as_list(MOST_VALUES), description="Equal to one of these.")

    @property
    def values(self) -> tuple[Value, ...]:
        return self.any if self.value is None else (self.value,)


class BucketMatch(_Match[BucketName]):
    pass


class HashMatch(_Match[HashText]):
    pass


class FormatMatch(_Match[FormatName]):
    pass


class NumberMatch(_Match[Number]):
    pass


class KeyMatch(_Match[KeyText]):
    one_of: ClassVar[tuple[str, ...]] = ("value", "any", "prefix")

    prefix: KeyText | None = Field(None, description="Starts with this, compared byte by byte.")


class _Range(_Part, Generic[Value]):
    some_of = ("gt", "gte", "lt", "lte")

    gt: Value | None = Field(None, description="Greater than this.")
    gte: Value | None = Field(None, description="This or greater.")
    lt: Value | None = Field(None, description="Less than this.")
    lte: Value | None = Field(None, description="This or less.")


class NumberRange(_Range[Number]):
    pass


class TimeRange(_Range[Time]):
    pass


class BucketCondition(_Part):
    field: Literal["bucket"]
    match: BucketMatch

    @property
    def test(self) -> Test:
        return OneOf(self.match.values)


class KeyCondition(_Part):
    field: Literal["key"]
    match: KeyMatch

    @property
    def test(self) -> Test:
        return OneOf(self.match.values) if self.match.prefix is None else StartsWith(self.match.prefix)


class ContentHashCondition(_Part):
    field: Literal["content_hash"]
    match: HashMatch

    @property
    def test(self) -> Test:
        return OneOf(tuple(bytes.fromhex(text) for text in self.match.values))


class FormatCondition(_Part):
    field: Literal["format"]
    match: FormatMatch

    @property
    def test(self) -> Test:
        return OneOf(self.match.values)


class NumberCondition(_Part):
    one_of = ("match", "range")

    field: Literal["size", "width", "height"]
    match: NumberMatch | None = None
    range: NumberRange | None = None

    @property
    def test(self) -> Test:
        if self.range is None:
            return OneOf(self.match.values if self.match is not None else ())
        return Between(self.range.gt, self.range.gte, self.range.lt, self.range.lte)


class TimeCondition(_Part):
    field: Literal["put_time"]
    range: TimeRange

    @property
    def test(self) -> Test:
        bounds = (self.range.gt, self.range.gte, self.range.lt, self.range.lte)
        return Between(*(None if time is None else (time - _EPOCH) // timedelta(microseconds=1) for time in bounds))


Condition: TypeAlias = BucketCondition | KeyCondition | ContentHashCondition | FormatCondition | NumberCondition | TimeCondition


def _kind(clause: Any) -> str | None:  # noqa: ANN401 - whatever was sent
    """What a clause is taken for, so that what is wrong with it is said in the words of that kind only."""
    field = clause.get("field", ...) if isinstance(clause, dict) else getattr(clause, "field", None)
    if field is ... or isinstance(clause, FilterGroup):
        return "group"
    if not isinstance(field, str):
        return None
    return "number" if field in ("size", "width", "height") else field


Clause = Annotated[
    Annotated[BucketCondition, Tag("bucket")]
    | Annotated[KeyCondition, Tag("key")]
    | Annotated[ContentHashCondition, Tag("content_hash")]
    | Annotated[FormatCondition, Tag("format")]
    | Annotated[NumberCondition, Tag("number")]
    | Annotated[TimeCondition, Tag("put_time")]
    | Annotated["FilterGroup", Tag("group")],
    Discriminator(
        _kind,
        custom_error_type="clause",
        custom_error_message="needs a field: bucket, key, content_hash, put_time, size, width, height or format; or is a group",
    ),
]


class FilterGroup(_Part):
    """All of `must`, at least one of `should`, none of `must_not`. In each list stand conditions and groups."""

    some_of = ("must", "should", "must_not")

    must: tuple[Clause, ...] = Field((), json_schema_extra=_as_list(MOST_CLAUSES))
    should: tuple[Clause, ...] = Field((), json_schema_extra=_as_list(MOST_CLAUSES))
    must_not: tuple[Clause, ...] = Field((), json_schema_extra=_as_list(MOST_CLAUSES))

    @property
    def clauses(self) -> tuple[Condition | FilterGroup, ...]:
        return (*self.must, *self.should, *self.must_not)

    def matches(self, thing: Described) -> bool:
        return (
            all(_holds(clause, thing) for clause in self.must)
            and (not self.should or any(_holds(clause, thing) for clause in self.should))
            and not any(_holds(clause, thing) for clause in self.must_not)
        )


def _holds(clause: Condition | FilterGroup, thing: Described) -> bool:
    if isinstance(clause, FilterGroup):
        return clause.matches(thing)
    value = _VALUE_OF[clause.field](thing)
    return value is not None and clause.test.accepts(value)


def within_bounds(group: FilterGroup) -> FilterGroup:
    """Raises PydanticCustomError when the filter as a whole is more than the stores should be asked."""
    if _depth(group) > DEEPEST_GROUP:
        raise PydanticCustomError("too_deep", "has more than {most} groups inside each other", {"most": DEEPEST_GROUP})
    clauses = list(_all_clauses(group))
    if len(clauses) > MOST_CLAUSES:
        raise PydanticCustomError("too_many", "has more than {most} conditions and groups", {"most": MOST_CLAUSES})
    tests = [clause.test for clause in clauses if not isinstance(clause, FilterGroup)]
    if sum(len(test.values) for test in tests if isinstance(test, OneOf)) > MOST_VALUES:
        raise PydanticCustomError("too_many", "has more than {most} values to be equal to", {"most": MOST_VALUES})
    return group


def _depth(group: FilterGroup) -> int:
    return 1 + max((_depth(clause) for clause in group.clauses if isinstance(clause, FilterGroup)), default=0)


def _all_clauses(group: FilterGroup) -> Iterator[Condition | FilterGroup]:
    for clause in group.clauses:
        yield clause
        if isinstance(clause, FilterGroup):
            yield from _all_clauses(clause)


# -- the filter of a request -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Place:
    """A bucket (None: any) and what keys start with, byte by byte: all that a scan and a feed of events are narrowed to."""

    bucket: str | None = None
    prefix: str = ""

    def holds(self, ref: ObjectRef) -> bool:
        return (self.bucket is None or ref.bucket == self.bucket) and ref.key.startswith(self.prefix)


@dataclass(frozen=True, slots=True)
class Filter:
    """`bucket` and `prefix` are short for what most ask; both must match, and so must `where`."""

    bucket: str | None = None
    prefix: str = ""
    where: FilterGroup | None = None

    def matches(self, thing: Described) -> bool:
        return Place(self.bucket, self.prefix).holds(thing.ref) and (self.where is None or self.where.matches(thing))
