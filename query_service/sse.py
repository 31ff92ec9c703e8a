"""Server-sent events as they are read: lines in, messages out (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """`last_id` is the id that a reader who comes back names, whether or not this message brought it."""

    data: str
    last_id: str


class Parser:
    """Feed it lines without their ends. `last_id` also moves with ids that come without data."""

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id
        self._id = last_id
        self._data: list[str] = []

    def feed(self, line: str) -> Message | None:
        """A message when this line ends one."""
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        return None

    def _dispatch(self) -> Message | None:
        self.last_id = self._id
        if not self._data:
            return None
        message = Message("\n".join(self._data), self.last_id)
        self._data.clear()
        return message
