"""Who may do what where: the scopes that routes ask for, and what an API key grants. Pure; the service asks, it never guesses.

A key that is limited to places sees a deployment that holds nothing else: what it may not see is answered as if it were not
there, so that a refusal does not tell that there is something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from pydantic import TypeAdapter, ValidationError

from schemas.filter import (
    BucketCondition,
    BucketMatch,
    BucketName,
    Filter,
    FilterGroup,
    KeyCondition,
    KeyMatch,
    KeyText,
    Place,
)
from schemas.identity import ObjectRef

MOST_PLACES = 32
"""Of one key: each is a condition of every search and list that it asks for."""

_BucketNames: TypeAdapter[str] = TypeAdapter(BucketName)
_KeyTexts: TypeAdapter[str] = TypeAdapter(KeyText)


class Scope(StrEnum):
    SEARCH = "search"
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


class Open(StrEnum):
    """Instead of a scope: a route that asks for no key. It must tell nothing of what is stored."""

    PAGE = "page"
    HEALTH = "health"
    METRICS = "metrics"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class Grant:
    """`admin` includes the other scopes. No places: everywhere."""

    scopes: frozenset[Scope]
    places: tuple[Place, ...] = ()

    @classmethod
    def of(cls, scopes: Iterable[Scope], places: Iterable[Place] = ()) -> Self:
        """Raises ValueError for a grant that could not be kept to."""
        grant = cls(frozenset(scopes), _outermost(places))
        if not grant.scopes:
            raise ValueError("a key needs at least one scope: " + ", ".join(Scope))
        if Scope.ADMIN in grant.scopes and grant.places:
            raise ValueError("admin is for the whole deployment: a key with places has the other scopes only")
        if len(grant.places) > MOST_PLACES:
            raise ValueError(f"a key has at most {MOST_PLACES} places")
        return grant

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def holds(self, ref: ObjectRef) -> bool:
        return not self.places or any(place.holds(ref) for place in self.places)

    def holds_some_of(self, bucket: str) -> bool:
        return not self.places or any(place.bucket == bucket for place in self.places)

    def narrowed(self, asked: Filter) -> Filter:
        """What was asked for and lies in these places: never more than either."""
        if not self.places:
            return asked
        inside = FilterGroup(should=tuple(_as_group(place) for place in self.places))
        return Filter(asked.bucket, asked.prefix, inside if asked.where is None else FilterGroup(must=(asked.where, inside)))


EVERYTHING = Grant(frozenset({Scope.ADMIN}))
"""What everyone has while keys are off."""


def place_from_text(text: str) -> Place:
    """`bucket` or `bucket/prefix`. Raises ValueError."""
    bucket, _, prefix = text.partition("/")
    try:
        return Place(_BucketNames.validate_python(bucket), _KeyTexts.validate_python(prefix) if prefix else "")
    except ValidationError:
        raise ValueError(f"{text!r} is no place: write BUCKET or BUCKET/PREFIX") from None


def place_text(place: Place) -> str:
    return f"{place.bucket}/{place.prefix}" if place.prefix else str(place.bucket)


def _outermost(places: Iterable[Place]) -> tuple[Place, ...]:
    """Without those that lie inside another, so that no object counts twice. Each names a bucket: two nest or are apart."""
    given = sorted(set(places), key=lambda place: (str(place.bucket), place.prefix))
    kept: list[Place] = []
    for place in given:
        if place.bucket is None:
            raise ValueError("a place names a bucket")
        # Sorted, so what contains it came before it.
        if not any(other.holds(ObjectRef(place.bucket, place.prefix)) for other in kept):
            kept.append(place)
    return tuple(kept)


def _as_group(place: Place) -> FilterGroup:
    bucket = BucketCondition(field="bucket", match=BucketMatch(value=place.bucket))
    if not place.prefix:
        return FilterGroup(must=(bucket,))
    return FilterGroup(must=(bucket, KeyCondition(field="key", match=KeyMatch(prefix=place.prefix))))
