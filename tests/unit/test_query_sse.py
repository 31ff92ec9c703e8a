"""Reading server-sent events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from query_service.sse import Message, Parser

# An id ends its line, and data is split into lines where it is written.
LINES = st.text(st.characters(exclude_characters="\r\n"), max_size=40)
IDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


def read(lines: list[str], parser: Parser | None = None) -> list[Message]:
    parser = parser or Parser()
    return [message for line in lines if (message := parser.feed(line)) is not None]


@given(st.lists(st.tuples(IDS, st.lists(LINES, min_size=1, max_size=3)), max_size=10))
def test_what_was_framed_comes_back(messages: list[tuple[str, list[str]]]) -> None:
    lines = [line for last_id, data in messages for line in (f"id: {last_id}", *(f"data: {part}" for part in data), "")]
    assert read(lines) == [Message("\n".join(data), last_id) for last_id, data in messages]


def test_comments_other_fields_and_ids_alone_are_no_messages() -> None:
    parser = Parser()
    assert read([": heartbeat", "", "retry: 2000", "id: 7", "", "event: x", ""], parser) == []
    assert parser.last_id == "7"


def test_an_id_counts_only_when_its_message_is_whole() -> None:
    parser = Parser("6")
    assert read(["id: 7", "data: half"], parser) == []
    assert parser.last_id == "6"


def test_a_message_without_an_id_keeps_the_last_one() -> None:
    assert read(["id: 7", "data: a", "", "data: b", ""]) == [Message("a", "7"), Message("b", "7")]
