"""A worker whose end is waited for in vain ends all the same."""

from __future__ import annotations

import threading

from processors.app import ended_within

PATIENCE_SECONDS = 30.0


def test_what_does_not_return_is_ended() -> None:
    statuses: list[int] = []
    ended = threading.Event()

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    with ended_within(0.0, end):
        assert ended.wait(PATIENCE_SECONDS)
    assert statuses == [1]


def test_what_returns_is_left_alone_and_nothing_waits_for_its_timer() -> None:
    with ended_within(3600.0, lambda _status: None):
        [timer] = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert timer.daemon
    timer.join(PATIENCE_SECONDS)
    assert not timer.is_alive()
