"""The bound on work taken in: how many requests are inside, how many of them work, and how many bytes they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from query_service.errors import too_busy


class Ticket:
    """One admitted request. What it holds is given back when it leaves."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.bytes_held = 0

    def hold(self, size: int) -> None:
        """Count bytes that this request now has in memory. Raises RequestRefused when all requests together hold too many."""
        self._admission.hold(size)
        self.bytes_held += size


class Admission:
    """`admit` at the door, `turn` around the work. Whoever finds no room is told so at once instead of being kept waiting.

    A slow sender is inside without taking a turn, so it keeps nobody from working.
    """

    def __init__(self, *, at_once: int, waiting: int, bytes_at_once: int = 0) -> None:
        self._room = at_once + waiting
        self._bytes_left = bytes_at_once
        self._inside = 0
        self.turn = asyncio.Semaphore(at_once)

    @property
    def inside(self) -> int:
        return self._inside

    @contextmanager
    def admit(self) -> Iterator[Ticket]:
        """Raises RequestRefused when there is no room."""
        if self._inside >= self._room:
            raise too_busy("Too many requests of this kind are being worked on. Try again.")
        self._inside += 1
        ticket = Ticket(self)
        try:
            yield ticket
        finally:
            self._inside -= 1
            self._bytes_left += ticket.bytes_held

    def hold(self, size: int) -> None:
        if size > self._bytes_left:
            raise too_busy("The pictures being searched for fill the memory set aside for them. Try again.")
        self._bytes_left -= size
