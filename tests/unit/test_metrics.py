"""Every metric moves when that happens which it counts. Those of the bridge's parsers, canary and scans: in their own tests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from infra import metrics
from infra.errors import StoreUnavailable
from infra.kafka.memory import Operation
from infra.metrics import store_error
from ingest_bridge.announcing import Source, announced
from processors.delivery import Batcher
from processors.work import Delivery
from query_service.batching import BatchingEmbedder
from query_service.recent import RecentVectors
from query_service.search import Picture, SearchRequest
from schemas.events import Cause, ObjectEvent
from schemas.identity import ObjectRef
from schemas.topics import OUTCOMES, Topic
from tests.query_world import AngleEmbedder, QueryWorld, decode, picture
from tests.unit.test_delivery import FakeEvent, FakeMessage, Work, finish, settle
from tests.unit.test_query_freshness import BOUND, Scene
from tests.unit.world import BROKEN, BUCKET, World, event_for

ROOT = Path(__file__).parents[2]


class Moved:
    """What was added to samples since this was made."""

    def __init__(self) -> None:
        self._before = self._samples()

    @staticmethod
    def _samples() -> Mapping[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
        }

    def by(self, name: str, **labels: str) -> float:
        key = (f"image_search_{name}", frozenset(labels.items()))
        return self._samples().get(key, 0.0) - self._before.get(key, 0.0)


@pytest.fixture
async def world() -> World:
    return await World().start()


def test_every_metric_is_set_somewhere() -> None:
    packages = ("infra", "ingest_bridge", "processors", "query_service")
    code = "\n".join(
        path.read_text() for package in packages for path in (ROOT / package).rglob("*.py") if path.name != "metrics.py"
    )
    names = {name for name, metric in vars(metrics).items() if isinstance(metric, (Counter, Gauge, Histogram))}
    # Set by a function of its own module, which adapters call.
    names.discard("STORE_ERRORS")
    assert {name for name in names if not re.search(rf"\b{name}(_COUNTED)?\.", code)} == set()


# -- bridge --------------------------------------------------------------------------------------------------------------------
def test_events_by_source_cause_and_change() -> None:
    ref, moved = ObjectRef(BUCKET, "a"), Moved()
    with announced([event_for(ref), event_for(ref), event_for(ref, removed=True)], Source.LOG):
        pass
    with announced([event_for(ref, cause=Cause.REPAIR)], Source.SCAN):
        pass
    with pytest.raises(StoreUnavailable), announced([event_for(ref)], Source.WEBHOOK):
        raise StoreUnavailable("broker", "as told")
    written = "events_written_total"
    assert moved.by(written, source="log", cause="notification", change="put") == 2
    assert moved.by(written, source="log", cause="notification", change="removal") == 1
    assert moved.by(written, source="scan", cause="repair", change="put") == 1
    assert moved.by(written, source="webhook", cause="notification", change="put") == 0


# -- worker --------------------------------------------------------------------------------------------------------------------
async def test_a_batch_with_its_steps(world: World) -> None:
    deliveries = [await world.put("a.jpg", b"a"), await world.put("bad.jpg", BROKEN), world.delivery(b"no event")]
    moved = Moved()
    await world.pipeline().process(deliveries)
    await world.pipeline().process(deliveries[:1])
    assert moved.by("events_read_total", cause="notification") == 3
    assert moved.by("events_known_total") == 1
    assert moved.by("batch_events_count") == 2
    assert moved.by("batch_events_sum") == 4
    for step in ("3 look up", "4 read", "6 decode", "7 embed", "8 vectors", "9 rows", "10 outcomes"):
        assert moved.by("step_seconds_count", step=step) == (2 if step == "3 look up" else 1), step
    assert moved.by("vectors_total", origin="embedded") == 2
    assert moved.by("outcomes_total", type="image-search.image.indexed", reason="") == 1
    assert moved.by("outcomes_total", type="image-search.image.failed", reason="CORRUPT_IMAGE") == 1
    assert moved.by("dead_letters_total", reason="CORRUPT_IMAGE") == 1
    assert moved.by("dead_letters_total", reason="EVENT_NOT_JSON") == 1


async def test_from_put_to_row_is_of_announced_pictures_that_can_be_found(world: World) -> None:
    def earlier(delivery: Delivery, seconds: float) -> Delivery:
        event = ObjectEvent.model_validate_json(delivery.value)
        time: datetime = event.time - timedelta(seconds=seconds)
        return replace(delivery, value=event.model_copy(update={"time": time}).to_json())

    moved = Moved()
    await world.pipeline().process([earlier(await world.put("a.jpg", b"a"), 20.0)])
    assert moved.by("put_to_row_seconds_count") == 1
    assert moved.by("put_to_row_seconds_sum") >= 20.0
    scanned = await world.objects.put(ObjectRef(BUCKET, "scanned.jpg"), b"s")
    await world.pipeline().process(
        [
            await world.put("bad.jpg", BROKEN),
            await world.remove("a.jpg"),
            world.event(scanned.ref, cause=Cause.SCAN),
        ]
    )
    assert moved.by("put_to_row_seconds_count") == 1, (
        "a failure, a removal and what a scan found are not found, or not just put"
    )


async def test_a_broker_that_is_away_is_tried_again(world: World) -> None:
    away = [1, 1]

    async def fault(operation: Operation, topic: Topic | None) -> None:
        if operation is Operation.SEND and topic is OUTCOMES and away:
            away.pop()
            raise StoreUnavailable("broker", "as told")

    delivery = await world.put("a.jpg", b"a")
    world.broker.before_call = fault
    moved = Moved()
    await world.pipeline().process([delivery])
    assert moved.by("retries_total", store="broker") == 2


async def test_a_write_that_lost_against_another(world: World) -> None:
    first, second = await world.put("a.jpg", b"a"), await world.put("a.jpg", b"b")
    rival = world.pipeline()

    async def overtake(step: int) -> None:
        if step == 8 and rival_runs:
            rival_runs.pop()
            await rival.process([second])

    rival_runs, moved = [1], Moved()
    await world.pipeline(overtake).process([first])
    assert moved.by("generation_conflicts_total") == 1


async def test_the_queue_and_what_is_in_hand() -> None:
    work = Work()
    batcher = Batcher(work.process, batch_size=2, batches_in_flight=1, queue_events=64)
    acked: list[int] = []
    for offset, key in enumerate("abcde"):
        await batcher.put(FakeEvent(FakeMessage(offset, key.encode()), acked))
    await batcher.start()
    await settle()
    assert REGISTRY.get_sample_value("image_search_events_queued") == 3
    assert REGISTRY.get_sample_value("image_search_events_in_hand") == 5
    await finish(batcher, work)
    assert REGISTRY.get_sample_value("image_search_events_queued") == 0
    assert REGISTRY.get_sample_value("image_search_events_in_hand") == 0


# -- all -----------------------------------------------------------------------------------------------------------------------
def test_a_store_that_does_not_answer_is_counted_by_its_name() -> None:
    moved = Moved()
    error = store_error("vector store", "no answer in 3 s")
    assert (error.store, str(error)) == ("vector store", "vector store is not available: no answer in 3 s")
    assert moved.by("store_errors_total", store="vector store") == 1


def test_every_adapter_counts_what_its_store_did_not_answer() -> None:
    for package in ("object_store", "metadata_store", "vector_store", "kafka"):
        for path in (ROOT / "infra" / package).glob("*.py"):
            if path.name != "memory.py":
                assert not re.search(r"(raise|return) StoreUnavailable\(", path.read_text()), path


# -- query service -------------------------------------------------------------------------------------------------------------
async def test_a_search_by_its_steps() -> None:
    world = await QueryWorld().start()
    await world.put("a.jpg", 0)
    moved = Moved()
    await world.searcher().search([(1.0, Picture(picture(0)))], SearchRequest(limit=1))
    for step in ("decode", "embed", "search", "metadata"):
        assert moved.by("search_step_seconds_count", step=step) == 1, step


async def test_a_query_vector_by_where_it_came_from() -> None:
    world = await QueryWorld().start()
    searcher = world.searcher(RecentVectors(8))
    moved = Moved()
    for _ in range(3):
        await searcher.search([(1.0, Picture(picture(0)))], SearchRequest(limit=1))
    assert moved.by("query_vectors_total", origin="embedded") == 1
    assert moved.by("query_vectors_total", origin="recent") == 2


async def test_pictures_of_a_call_of_the_model() -> None:
    embedder, moved = BatchingEmbedder(AngleEmbedder(), pictures_at_once=8, waiting=8), Moved()
    pixels = await decode(picture(0))
    await asyncio.gather(*(embedder.embed(pixels) for _ in range(3)))
    assert moved.by("query_batch_pictures_count") == 1
    assert moved.by("query_batch_pictures_sum") == 3


async def test_the_lag_and_the_age_of_what_is_found() -> None:
    scene = Scene()
    await scene.handed_over(100)
    for _ in range(3):
        await scene.event()
    scene.clock.seconds = 40
    await scene.through()
    assert REGISTRY.get_sample_value("image_search_objects_lag") == 3
    assert REGISTRY.get_sample_value("image_search_indexed_through_lag_seconds") == 40 + BOUND.total_seconds()
    scene.work_off()
    await scene.through()
    assert REGISTRY.get_sample_value("image_search_objects_lag") == 0
    assert REGISTRY.get_sample_value("image_search_indexed_through_lag_seconds") == BOUND.total_seconds()
