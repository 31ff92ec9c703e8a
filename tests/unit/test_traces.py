"""A trace begins with the change, goes on in headers, and ends with the outcome; where none is recorded, none is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry.trace import SpanKind, StatusCode

from infra.errors import StoreUnavailable
from infra.kafka.interface import Record
from infra.kafka.memory import Operation
from infra.tracing import begin, carried_by
from ingest_bridge.announcing import Source, announced
from processors.delivery import delivery_of
from processors.work import Delivery, PartitionsRevoked
from schemas.events import Cause, ObjectEvent
from schemas.identity import ObjectRef
from schemas.topics import DEAD_LETTERS, HEADER_TRACE_PARENT, OBJECTS, OUTCOMES, Topic
from tests.spans import header_of, linked_ids, recorded_spans, span_id, trace_id
from tests.unit.test_delivery import FakeEvent, FakeMessage
from tests.unit.world import BROKEN, BUCKET, World, event_for

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_RECORDED = CALLER[:-2] + "00"
STEPS = ["1 parse", "2 collapse", "3 look up", "4 read", "5 hash", "6 decode", "7 embed", "8 vectors", "9 rows", "10 outcomes"]


@pytest.fixture
async def world() -> World:
    return await World().start()


async def written(world: World, topic: Topic) -> list[Record]:
    return sorted(world.broker.records(topic), key=lambda record: record.key)


async def announce(world: World, events: Sequence[ObjectEvent], source: Source = Source.LOG) -> list[Delivery]:
    """What the bridge does with events; what the worker gets of them."""
    with announced(events, source) as messages:
        await world.producer.send(OBJECTS, messages)
    return [
        Delivery("objects", record.partition, record.offset, record.time_ms, record.key, record.value, record.headers)
        for record in await written(world, OBJECTS)
    ]


async def put(world: World, key: str, data: bytes) -> ObjectEvent:
    return ObjectEvent.model_validate_json((await world.put(key, data)).value)


# -- from the put to the outcome ---------------------------------------------------------------------------------------------
async def test_one_trace_from_the_change_to_the_outcome(world: World) -> None:
    with recorded_spans() as spans:
        deliveries = await announce(world, [await put(world, "a.jpg", b"a")])
        await world.pipeline().process(deliveries)
    changed, worked, batch = spans.one("object changed"), spans.one("work on object"), spans.one("batch")
    assert {trace_id(span) for span in spans.all()} == {trace_id(changed)}
    assert deliveries[0].headers == {HEADER_TRACE_PARENT: header_of(changed)}
    assert spans.below(changed) == ["work on object"]
    assert spans.below(worked) == ["batch"]
    assert spans.below(batch) == STEPS
    assert (changed.kind, worked.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    (outcome,) = await written(world, OUTCOMES)
    assert outcome.headers[HEADER_TRACE_PARENT] == header_of(worked)
    object_id = ObjectRef(BUCKET, "a.jpg").object_id.hex()
    for span in (changed, worked):
        assert span.attributes is not None
        assert span.attributes["image_search.object_id"] == object_id
        assert span.attributes["image_search.cause"] == Cause.NOTIFICATION
    assert [event.name for event in worked.events] == ["image-search.image.indexed"]


async def test_a_batch_of_many_leaves_each_in_its_trace_and_shows_the_way_to_the_steps(world: World) -> None:
    with recorded_spans() as spans:
        deliveries = await announce(world, [await put(world, key, key.encode()) for key in ("a.jpg", "b.jpg", "c.jpg")])
        await world.pipeline().process(deliveries)
    worked, batch = spans.named("work on object"), spans.one("batch")
    traces = {trace_id(span) for span in worked}
    assert traces == {trace_id(span) for span in spans.named("object changed")}
    assert len(traces) == 3
    assert all(linked_ids(span) == {span_id(batch)} for span in worked)
    assert linked_ids(batch) == {span_id(span) for span in worked}
    assert spans.below(batch) == STEPS
    outcomes = await written(world, OUTCOMES)
    assert {outcome.headers[HEADER_TRACE_PARENT] for outcome in outcomes} == {header_of(span) for span in worked}


async def test_the_trace_begins_when_the_store_changed(world: World) -> None:
    now = datetime.now(UTC)
    event = event_for(ObjectRef(BUCKET, "a.jpg"))
    with recorded_spans() as spans:
        for time in (now - timedelta(seconds=90), now + timedelta(hours=1)):
            with announced([event.model_copy(update={"time": time})], Source.LOG):
                pass
    early, late = spans.named("object changed")
    for span in (early, late):
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time >= span.start_time, "a clock that is ahead of ours makes no span end before it began"
    assert early.start_time == pytest.approx((now - timedelta(seconds=90)).timestamp() * 1e9, abs=1e6)


async def test_an_event_that_could_not_be_written_ends_its_trace_as_failed(world: World) -> None:
    async def away(_operation: Operation, _topic: Topic | None) -> None:
        raise StoreUnavailable("broker", "as told")

    world.broker.before_call = away
    with recorded_spans() as spans, pytest.raises(StoreUnavailable):
        await announce(world, [await put(world, "a.jpg", b"a")])
    assert spans.one("object changed").status.status_code is StatusCode.ERROR


# -- what does not end as indexed --------------------------------------------------------------------------------------------
async def test_dead_letters_keep_their_trace(world: World) -> None:
    with recorded_spans() as spans:
        (bad_picture,) = await announce(world, [await put(world, "bad.jpg", BROKEN)])
        no_event = replace(bad_picture, value=b"no event", headers=carried_by(begin("stranger")))
        await world.pipeline().process([bad_picture, no_event])
    letters = {letter.value: letter for letter in await written(world, DEAD_LETTERS)}
    of_picture, of_no_event = (letters[one.value].headers[HEADER_TRACE_PARENT].split("-")[1] for one in (bad_picture, no_event))
    assert of_picture == trace_id(spans.one("object changed"))
    assert of_no_event != of_picture
    assert {of_picture, of_no_event} == {trace_id(span) for span in spans.named("work on object")}
    reasons = [(span.attributes or {}).get("image_search.reason") for span in spans.named("work on object")]
    assert "CORRUPT_IMAGE" in reasons


async def test_an_event_that_another_speaks_for_links_to_it(world: World) -> None:
    event = await put(world, "a.jpg", b"a")
    with recorded_spans() as spans:
        deliveries = await announce(world, [event, event])
        await world.pipeline().process(deliveries)
    collapsed, kept = sorted(
        spans.named("work on object"), key=lambda span: "image_search.collapsed" not in (span.attributes or {})
    )
    assert span_id(kept) in linked_ids(collapsed)
    assert [event.name for event in kept.events] == ["image-search.image.indexed"]
    assert collapsed.events == ()


async def test_a_doubled_notification_says_that_it_was_known(world: World) -> None:
    event = await put(world, "a.jpg", b"a")
    await world.pipeline().process([world.delivery(event.to_json(), event.data.ref.topic_key)])
    with recorded_spans() as spans:
        await world.pipeline().process(await announce(world, [event]))
    assert (spans.one("work on object").attributes or {})["image_search.known"] is True


async def test_a_batch_that_was_taken_away_is_dropped_and_no_failure(world: World) -> None:
    with recorded_spans() as spans:
        deliveries = await announce(world, [await put(world, "a.jpg", b"a")])
        with pytest.raises(PartitionsRevoked):
            await world.pipeline().process(deliveries, lambda: False)
    worked = spans.one("work on object")
    assert (worked.attributes or {})["image_search.dropped"] is True
    assert worked.status.status_code is StatusCode.UNSET


async def test_a_key_that_no_message_can_carry_is_written_as_it_can_be(world: World) -> None:
    ref = ObjectRef(BUCKET, "half \ud83d.jpg")
    event = event_for(ObjectRef(BUCKET, "x"))
    lone = event.model_copy(update={"data": event.data.model_copy(update={"key": ref.key}), "subject": "x"})
    with recorded_spans() as spans, pytest.raises(ValueError, match="surrogates"), announced([lone], Source.SCAN):
        pass
    assert (spans.one("object changed").attributes or {})["image_search.key"] == "half ?.jpg"


# -- recorded or not -----------------------------------------------------------------------------------------------------------
async def test_without_traces_nothing_is_added(world: World) -> None:
    (delivery,) = await announce(world, [await put(world, "a.jpg", b"a")])
    assert delivery.headers == {}
    await world.pipeline().process([delivery])
    (outcome,) = await written(world, OUTCOMES)
    assert set(outcome.headers) == {"content-type"}


@pytest.mark.parametrize("recording", [True, False])
async def test_a_trace_that_is_not_recorded_goes_on_all_the_same(world: World, recording: bool) -> None:
    """Not recorded because the worker traces nothing, or because who began the trace decided so."""
    came = NOT_RECORDED if recording else CALLER
    delivery = replace(await world.put("a.jpg", b"a"), headers={HEADER_TRACE_PARENT: came})
    if recording:
        with recorded_spans() as spans:
            await world.pipeline().process([delivery])
        assert spans.all() == []
    else:
        await world.pipeline().process([delivery])
    (outcome,) = await written(world, OUTCOMES)
    sent = outcome.headers[HEADER_TRACE_PARENT]
    assert (sent.split("-")[1], sent[-2:]) == (came.split("-")[1], came[-2:])


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", CALLER + "x", CALLER * 20])
async def test_a_broken_header_begins_a_trace_of_its_own(world: World, header: str) -> None:
    delivery = replace(await world.put("a.jpg", b"a"), headers={HEADER_TRACE_PARENT: header})
    with recorded_spans() as spans:
        await world.pipeline().process([delivery])
    worked = spans.one("work on object")
    assert worked.parent is None
    assert trace_id(worked) != CALLER.split("-")[1]


async def test_the_share_is_of_traces_that_begin_here(world: World) -> None:
    with recorded_spans(sample_share=0.0) as spans:
        with announced([event_for(ObjectRef(BUCKET, "a.jpg"))], Source.SCAN) as messages:
            flags = int(messages[0].headers[HEADER_TRACE_PARENT][-2:], 16)
            assert flags & 1 == 0, "so that no worker records a part of it"
        assert spans.all() == []
        begin("continued", headers={HEADER_TRACE_PARENT: CALLER}).end()
    assert trace_id(spans.one("continued")) == CALLER.split("-")[1]


def test_headers_come_from_faust_as_pairs_and_may_have_no_value() -> None:
    message = FakeMessage(7, b"k", headers=((HEADER_TRACE_PARENT, CALLER.encode()), ("empty", None), ("bytes", b"\xff")))
    assert delivery_of(FakeEvent(message, [])).headers == {HEADER_TRACE_PARENT: CALLER, "empty": "", "bytes": "\ufffd"}


def test_who_sends_no_traces_does_not_load_what_sends_them() -> None:
    code = (
        "import sys, infra.tracing, infra.settings, processors.pipeline, query_service.app, ingest_bridge.service\n"
        "with infra.tracing.traces(infra.settings.CommonSettings(), 'test'): pass\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# -- logs ----------------------------------------------------------------------------------------------------------------------
def test_a_line_of_the_log_names_its_trace() -> None:
    code = (
        "import structlog\n"
        "from infra.settings import CommonSettings\n"
        "from infra.telemetry import configure_logging\n"
        "from infra.tracing import begin, within\n"
        "configure_logging(CommonSettings(), 'test')\n"
        "log = structlog.get_logger('x')\n"
        "log.info('outside')\n"
        f"with within(begin('x', headers={{'traceparent': '{CALLER}'}})):\n"
        "    log.info('inside', object_id='ab')\n"
        "    log.info('of an object', trace_id='its own')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    outside, inside, of_object = (json.loads(line) for line in done.stderr.splitlines())
    assert "trace_id" not in outside
    assert (inside["trace_id"], inside["object_id"]) == (CALLER.split("-")[1], "ab")
    assert of_object["trace_id"] == "its own"
