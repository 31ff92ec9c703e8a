"""The bound on requests and on the bytes they hold."""

from __future__ import annotations

import pytest

from query_service.admission import Admission
from query_service.errors import RequestRefused
from schemas.api import ErrorCode


def test_one_too_many_is_told_so_at_once_and_when_to_come_back() -> None:
    admission = Admission(at_once=1, waiting=1)
    with admission.admit(), admission.admit():
        with pytest.raises(RequestRefused) as refused, admission.admit():
            pass
        assert refused.value.code is ErrorCode.TOO_MANY_REQUESTS
        assert refused.value.headers["Retry-After"] == "1"
        assert admission.inside == 2
    with admission.admit():
        assert admission.inside == 1


def test_bytes_are_shared_by_all_and_given_back() -> None:
    admission = Admission(at_once=2, waiting=0, bytes_at_once=100)
    with admission.admit() as one, admission.admit() as other:
        one.hold(60)
        with pytest.raises(RequestRefused):
            other.hold(41)
        other.hold(40)
    with admission.admit() as later:
        later.hold(100)


def test_a_request_that_failed_gives_its_place_and_bytes_back() -> None:
    admission = Admission(at_once=1, waiting=0, bytes_at_once=10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.admit() as ticket:
            ticket.hold(10)
            raise ZeroDivisionError
    assert admission.inside == 0


async def test_turns_are_fewer_than_places() -> None:
    admission = Admission(at_once=1, waiting=5)
    async with admission.turn:
        assert admission.turn.locked()
