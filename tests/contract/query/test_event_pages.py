"""Events page by page in JSON: at once, or when something comes; filters; the same order and cursors as the stream has."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from infra.kafka.interface import Message
from schemas.api import ErrorCode
from schemas.events import OutcomeType
from schemas.topics import OUTCOMES
from tests.contract.query.test_events import event_ids, read_events
from tests.query_http import Client, refused
from tests.query_world import BUCKET, QueryWorld


async def page(client: Client, **parameters: str | int) -> dict[str, Any]:
    response = await client.get("/v1/events", params=parameters, headers={"Accept": "application/json"})
    answer: dict[str, Any] = await response.json()
    assert response.status == 200, answer
    assert answer.keys() == {"events", "cursor", "more"}
    return answer


async def test_pages_give_each_event_once_and_in_order_by_object(world: QueryWorld, client: Client) -> None:
    sent = [await world.publish(f"{number % 4}.jpg", generation=number + 1) for number in range(30)]
    seen: list[Any] = []
    answer = await page(client, cursor="earliest", limit=7)
    while answer["more"]:
        assert len(answer["events"]) == 7
        seen += answer["events"]
        answer = await page(client, cursor=answer["cursor"], limit=7)
    seen += answer["events"]
    assert sorted(event["id"] for event in seen) == sorted(event.id for event in sent)
    for key in range(4):
        generations = [event["data"]["generation"] for event in seen if event["data"]["key"] == f"{key}.jpg"]
        assert generations == sorted(generations)
    # A cursor is one whichever way it was come by.
    late = await world.publish("0.jpg", generation=31)
    async with client.get("/v1/events", params={"cursor": answer["cursor"], "follow": "false"}) as response:
        assert event_ids((await read_events(response))[0]) == [late.id]


async def test_a_page_that_waits_answers_when_something_comes(world: QueryWorld, client: Client) -> None:
    start = (await page(client))["cursor"]
    asking = asyncio.create_task(page(client, cursor=start, wait=60))
    await asyncio.sleep(0.2)
    assert not asking.done()
    event = await world.publish("new.jpg")
    async with asyncio.timeout(20):
        answer = await asking
    assert ([one["id"] for one in answer["events"]], answer["more"]) == ([event.id], False)
    assert (await page(client, cursor=answer["cursor"]))["events"] == []


async def test_a_wait_ends_and_its_cursor_is_behind_what_was_not_wanted(world: QueryWorld, client: Client) -> None:
    for number in range(3):
        await world.publish(f"{number}.jpg")
    answer = await page(client, cursor="earliest", type="failed", wait=1)
    assert (answer["events"], answer["more"]) == ([], False)
    assert (await page(client, cursor=answer["cursor"]))["events"] == []


async def test_which_form_is_asked_for(world: QueryWorld, client: Client) -> None:
    await world.publish("a.jpg")
    address = "/v1/events?cursor=earliest&follow=false"
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "text/event-stream"}, {"Accept": "text/event-stream, application/json"}):
        assert (await client.get(address, headers=headers)).content_type == "text/event-stream"
    for headers, more in (({"Accept": "application/json; q=0.9"}, ""), ({}, "&wait=0")):
        assert (await client.get(address + more, headers=headers)).content_type == "application/json"


async def test_events_that_a_filter_matches(world: QueryWorld, client: Client) -> None:
    known: dict[str, Any] = {"size": 5, "width": 640, "height": 480, "format": "PNG", "content_hash": "ab" * 32}
    wide = await world.publish("wide.png", **known, put_time="2026-01-31T12:00:00Z")
    await world.publish("narrow.png", **{**known, "width": 10})
    gone = await world.publish("gone.png", kind=OutcomeType.DELETED)
    # Fields and types that are newer than this version are no reason to leave an event out.
    newer = {"type": "image-search.image.matched", "id": "m", "data": {"bucket": BUCKET, "key": "k", "width": 700, "watch": 7}}
    await world.broker.send(OUTCOMES, [_message(newer)])

    async def found(*clauses: dict[str, Any], name: str = "must") -> set[str]:
        answer = await page(client, cursor="earliest", filter=json.dumps({name: clauses}))
        return {event["id"] for event in answer["events"]}

    assert await found({"field": "width", "range": {"gte": 640}}) == {wide.id, "m"}
    assert await found({"field": "content_hash", "match": {"value": "ab" * 32}}, {"field": "width", "range": {"gt": 99}}) == {
        wide.id
    }
    assert await found({"field": "put_time", "range": {"gte": "2026-01-31T12:00:00Z"}}) == {wide.id}
    assert await found({"field": "format", "match": {"value": "png"}}, name="must_not") == {gone.id, "m"}
    parameters = {
        "cursor": "earliest",
        "follow": "false",
        "filter": json.dumps({"must": [{"field": "size", "match": {"value": 5}}]}),
    }
    async with client.get("/v1/events", params={**parameters, "prefix": "w"}) as response:
        assert event_ids((await read_events(response))[0]) == [wide.id]


@pytest.mark.parametrize("query", ["wait=61", "wait=-1", "wait=x", "wait=0&limit=0", "wait=0&limit=501"])
async def test_what_a_page_may_not_ask(client: Client, query: str) -> None:
    await refused(await client.get(f"/v1/events?{query}"), ErrorCode.INVALID_REQUEST)


async def test_a_page_is_refused_as_a_stream_is(client: Client) -> None:
    await refused(await client.get("/v1/events?wait=0&cursor=nonsense"), ErrorCode.INVALID_CURSOR)
    await refused(await client.get("/v1/events?wait=0&filter=[]"), ErrorCode.INVALID_FILTER)


def _message(event: dict[str, Any]) -> Message:
    return Message(b"images/k", json.dumps(event).encode())
