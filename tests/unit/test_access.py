"""What a key grants: places, and filters that they narrow and never widen."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.access import EVERYTHING, MOST_PLACES, Grant, Scope, place_from_text, place_text
from schemas.filter import BucketCondition, BucketMatch, Filter, FilterGroup, KeyCondition, KeyMatch, Place
from schemas.identity import ContentHash, ObjectRef


@dataclass(frozen=True)
class Thing:
    ref: ObjectRef
    content_hash: ContentHash | None = None
    put_time_us: int | None = None
    size: int | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None


buckets = st.sampled_from(["one", "two", "three"])
keys = st.text(st.sampled_from("ab/%_é"), min_size=1, max_size=4)
places = st.builds(Place, buckets, st.text(st.sampled_from("ab/%_é"), max_size=3))
grants = st.builds(lambda given: Grant.of([Scope.READ], given), st.lists(places, max_size=5))
conditions = st.one_of(
    st.builds(lambda bucket: BucketCondition(field="bucket", match=BucketMatch(value=bucket)), buckets),
    st.builds(lambda prefix: KeyCondition(field="key", match=KeyMatch(prefix=prefix)), keys),
)
groups = st.one_of(
    st.none(),
    *(st.builds(lambda some, name=name: FilterGroup(**{name: tuple(some)}), st.lists(conditions, min_size=1, max_size=3))
      for name in ("must", "should", "must_not")),
)  # fmt: skip
filters = st.builds(Filter, st.one_of(st.none(), buckets), st.text(st.sampled_from("ab/"), max_size=2), groups)
refs = st.builds(ObjectRef, buckets, keys)


@given(grants, filters, refs)
def test_a_narrowed_filter_matches_what_both_hold_and_nothing_else(grant: Grant, asked: Filter, ref: ObjectRef) -> None:
    thing = Thing(ref)
    assert grant.narrowed(asked).matches(thing) is (asked.matches(thing) and grant.holds(ref))


@given(st.lists(places, min_size=1, max_size=8), refs)
def test_places_that_lie_inside_others_are_left_out_and_change_nothing(given_places: list[Place], ref: ObjectRef) -> None:
    grant = Grant.of([Scope.READ], given_places)
    assert grant.holds(ref) is any(place.holds(ref) for place in given_places)
    # So that what is counted place by place is counted once.
    assert sum(place.holds(ref) for place in grant.places) <= 1


@given(places)
def test_a_place_is_read_back_from_its_text(place: Place) -> None:
    assert place_from_text(place_text(place)) == place


@pytest.mark.parametrize("text", ["", "/", "/prefix", "Bucket", "a b", "bucket/\0", "bucket/" + "x" * 1025, "*"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no place"):
        place_from_text(text)


def test_no_places_is_everywhere() -> None:
    grant = Grant.of([Scope.SEARCH])
    assert grant.holds(ObjectRef("any", "thing"))
    assert grant.holds_some_of("any")
    assert grant.narrowed(Filter("a", "b")) == Filter("a", "b")


@pytest.mark.parametrize("scope", Scope)
def test_a_scope_allows_itself_and_admin_allows_all(scope: Scope) -> None:
    assert Grant.of([scope]).allows(scope)
    assert EVERYTHING.allows(scope)
    others = set(Scope) - {scope, Scope.ADMIN}
    assert not any(Grant.of([other]).allows(scope) for other in others)


def test_grants_that_cannot_be_kept_to_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one scope"):
        Grant.of([])
    with pytest.raises(ValueError, match="whole deployment"):
        Grant.of([Scope.ADMIN], [Place("images")])
    with pytest.raises(ValueError, match="names a bucket"):
        Grant.of([Scope.READ], [Place(None, "a/")])
    with pytest.raises(ValueError, match="at most"):
        Grant.of([Scope.READ], [Place(f"bucket-{number}") for number in range(MOST_PLACES + 1)])
