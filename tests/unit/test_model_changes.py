"""A change of model on the twins: what each store holds of both models, and which changes are refused."""

from __future__ import annotations

import asyncio

import pytest

from infra.model_table import ModelChangeRefused, find_model, roll_back
from infra.verify import Report, verify_stores
from processors.model_changes import ReindexProgress, activate, compare, drop, fill
from schemas.events import Cause
from schemas.identity import ModelFingerprint, ObjectRef, content_hash_of
from schemas.tables import JobState, ModelState
from tests.unit.world import BUCKET, MODEL, World

NEW = ModelFingerprint("e" * 64)
NEWER = ModelFingerprint("d" * 64)
COLLECTION_OF_NEW = "of_eeeeeeee"


@pytest.fixture
async def world() -> World:
    return await World().start()


async def _no_wait(_seconds: float) -> None:
    await asyncio.sleep(0)


async def _filled(world: World, *keys: str) -> None:
    await world.pipeline().process([world.event(ObjectRef(BUCKET, key), cause=Cause.SCAN) for key in keys])


async def test_puts_and_deletes_go_to_every_model_that_is_kept(world: World) -> None:
    await world.add_model(NEW, ModelState.PREVIOUS)
    await world.pipeline().process([await world.put("a.jpg", b"one"), await world.put("b.jpg", b"two")])
    assert await world.vector_content("a.jpg", COLLECTION_OF_NEW) == content_hash_of(b"one")
    assert await world.metadata.model_coverage(NEW) == (2, 2)
    await world.pipeline().process([await world.remove("a.jpg")])
    assert await world.vector_content("a.jpg", COLLECTION_OF_NEW) is None
    assert await world.metadata.model_coverage(NEW) == (1, 1)


async def test_filling_takes_the_active_models_vectors_as_they_are_and_tells_nobody(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    told = len(await world.outcomes())
    await world.add_model(NEW)
    event = await world.put("a.jpg", b"one")
    await world.pipeline().process([event])
    assert await world.metadata.model_coverage(NEW) == (1, 1)
    assert len(world.decoder.decoded) == 2  # once for each model, and not again for the old one
    assert len(await world.outcomes()) == told


async def test_a_model_that_is_dropped_in_the_middle_of_a_batch_is_owed_nothing(world: World) -> None:
    row = await world.add_model(NEW)

    async def drop_after_embedding(step: int) -> None:
        if step == 7:
            await drop(NEW, world.metadata, world.vectors, sleep=_no_wait)

    await world.pipeline(drop_after_embedding).process([await world.put("a.jpg", b"one")])
    assert await world.vector_content("a.jpg") == content_hash_of(b"one")
    assert not await world.vectors.has_collection(row.collection)


async def _verified(world: World, model: ModelFingerprint) -> Report:
    return await verify_stores(
        world.objects, world.metadata, world.vectors, buckets=[BUCKET], grace_seconds=0.0, whole=frozenset({model})
    )


async def test_only_a_model_that_holds_everything_becomes_active_and_one_can_go_back(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    await world.add_model(NEW)
    with pytest.raises(ModelChangeRefused, match="1 missing"):
        await activate("another", world.metadata, lambda model: _verified(world, model))
    await _filled(world, "a.jpg")
    await activate("another", world.metadata, lambda model: _verified(world, model))
    assert {row.fingerprint: row.state for row in await world.metadata.models()} == {
        MODEL: ModelState.PREVIOUS,
        NEW: ModelState.ACTIVE,
    }
    await world.pipeline().process([await world.put("b.jpg", b"two")])
    assert [outcome.data.model for outcome in await world.outcomes()] == ["bytes", "another"]
    assert (await roll_back(world.metadata)).fingerprint == MODEL
    assert await world.metadata.model_coverage(MODEL) == (2, 2)


async def test_changes_that_would_break_a_promise_are_refused(world: World) -> None:
    with pytest.raises(ModelChangeRefused, match="no previous model"):
        await roll_back(world.metadata)
    with pytest.raises(ModelChangeRefused, match="is the active model"):
        await drop("bytes", world.metadata, world.vectors, sleep=_no_wait)
    with pytest.raises(ModelChangeRefused, match="no model 'none'"):
        find_model(await world.metadata.models(), "none")
    await world.add_model(NEW, ModelState.PREVIOUS)
    await world.add_model(NEWER)
    with pytest.raises(ModelChangeRefused, match="name of several"):
        find_model(await world.metadata.models(), "another")
    with pytest.raises(ModelChangeRefused, match="models drop eeeeeeeeeeee"):
        await activate(NEWER[:8], world.metadata, lambda model: _verified(world, model))


async def test_filling_asks_for_scans_until_nothing_is_missing_and_says_how_far_it_is(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one"), await world.put("b.jpg", b"two")])
    await world.add_model(NEW)
    progress = ReindexProgress()
    scans = 0

    async def scan_and_work(_seconds: float) -> None:
        """The bridge and the workers, as each look at the progress finds them: the first scan leaves one object out."""
        nonlocal scans
        job = await world.metadata.claim_job(["scan"], owner="bridge", lease_seconds=60)
        if job is not None:
            scans += 1
            await _filled(world, "a.jpg" if scans == 1 else "b.jpg")
            await world.metadata.update_job(job.job_id, owner="bridge", state=JobState.DONE, progress={})

    clock = iter(range(1_000_000))
    await fill(NEW, world.metadata, [BUCKET], progress, sleep=scan_and_work, now=lambda: float(next(clock)), quiet_seconds=3.0)
    assert (progress.phase, progress.filled, progress.to_fill, scans) == ("filled", 2, 2, 2)


async def test_filling_that_gets_nowhere_ends_and_says_what_is_missing(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    await world.add_model(NEW)

    async def scan(_seconds: float) -> None:
        job = await world.metadata.claim_job(["scan"], owner="bridge", lease_seconds=60)
        if job is not None:
            await world.metadata.update_job(job.job_id, owner="bridge", state=JobState.DONE, progress={})

    clock = iter(range(1_000_000))
    with pytest.raises(ModelChangeRefused, match="1 of 1 indexed objects"):
        await fill(
            NEW, world.metadata, [BUCKET], ReindexProgress(), sleep=scan, now=lambda: float(next(clock)), quiet_seconds=3.0
        )


async def test_models_that_see_alike_agree_on_all_neighbours(world: World) -> None:
    new = await world.add_model(NEW, ModelState.PREVIOUS)
    await world.pipeline().process([await world.put(f"{number}.jpg", b"%d" % number) for number in range(20)])
    [old] = await world.metadata.models([ModelState.ACTIVE])
    assert (await compare(old, new, world.metadata, world.vectors))["overlap_at_10"] == 1.0
