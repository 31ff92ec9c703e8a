"""The life of a batch on the twins: what each object ends as, whatever happens on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection

import pytest

from infra.errors import StoreRefused, StoreUnavailable
from infra.object_store.memory import Operation
from processors.work import Delivery
from schemas.events import Cause, OutcomeType, ReasonCode
from schemas.identity import ObjectId, ObjectRef, content_hash_of
from schemas.tables import RowState
from schemas.topics import HEADER_OFFSET, HEADER_REASON
from schemas.vectors import StoredVector
from tests.unit.world import BROKEN, BUCKET, COLLECTION, World, vector_of


@pytest.fixture
async def world() -> World:
    return await World().start()


async def types_of(world: World, key: str) -> list[OutcomeType]:
    return [outcome.type for outcome in await world.outcomes() if outcome.data.key == key]


async def test_a_put_becomes_a_row_a_vector_and_an_outcome(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"picture")])
    row = await world.row("a.jpg")
    assert row is not None
    assert (row.state, row.generation, row.published_generation) == (RowState.INDEXED, 1, 1)
    assert row.content_hash == content_hash_of(b"picture")
    assert row.md5 == hashlib.md5(b"picture", usedforsecurity=False).digest()
    assert (row.width, row.height, row.format) == (40, 30, "JPEG")
    (hit,) = await world.vectors.search(COLLECTION, vector_of(b"picture"), limit=5)
    assert hit.object_id == row.object_id
    (outcome,) = await world.outcomes()
    assert (outcome.type, outcome.data.generation) == (OutcomeType.INDEXED, 1)
    assert outcome.data.timings_ms is not None
    assert outcome.data.timings_ms.since_put is not None


async def test_a_doubled_notification_changes_nothing(world: World) -> None:
    event = await world.put("a.jpg", b"picture")
    await world.pipeline().process([event])
    await world.pipeline().process([event, event])
    assert len(world.decoder.decoded) == 1
    assert len(await world.outcomes()) == 1


async def test_an_overwrite_updates_and_an_old_event_replayed_last_does_no_harm(world: World) -> None:
    old = await world.put("a.jpg", b"one")
    new = await world.put("a.jpg", b"two")
    await world.pipeline().process([new])
    await world.pipeline().process([old])
    row = await world.row("a.jpg")
    assert row is not None
    assert row.content_hash == content_hash_of(b"two") == await world.vector_content("a.jpg")
    assert await types_of(world, "a.jpg") == [OutcomeType.INDEXED]


async def test_a_delete_removes_row_state_and_vector_and_is_told_once(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    gone = await world.remove("a.jpg")
    await world.pipeline().process([gone])
    await world.pipeline().process([gone])
    row = await world.row("a.jpg")
    assert row is not None
    assert row.state is RowState.DELETED
    assert await world.vector_content("a.jpg") is None
    assert await types_of(world, "a.jpg") == [OutcomeType.INDEXED, OutcomeType.DELETED]


async def test_a_delete_of_what_was_never_there_says_nothing(world: World) -> None:
    await world.pipeline().process([await world.remove("never.jpg")])
    row = await world.row("never.jpg")
    assert row is not None  # the fence against a slower writer that read the object before it was gone
    assert (row.state, row.is_published) == (RowState.DELETED, True)
    assert await world.outcomes() == []


async def test_a_delete_event_of_an_object_that_is_there_again_indexes_it(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    gone = await world.remove("a.jpg")
    await world.put("a.jpg", b"two")
    await world.pipeline().process([gone])
    assert await world.vector_content("a.jpg") == content_hash_of(b"two")
    assert await types_of(world, "a.jpg") == [OutcomeType.INDEXED, OutcomeType.UPDATED]


async def test_broken_bytes_cost_one_dead_letter_and_their_neighbours_nothing(world: World) -> None:
    batch = [await world.put("a.jpg", b"one"), await world.put("b.jpg", BROKEN), await world.put("c.jpg", b"two")]
    await world.pipeline().process(batch)
    assert [(await world.row(key)).state for key in ("a.jpg", "b.jpg", "c.jpg")] == [  # type: ignore[union-attr]
        RowState.INDEXED,
        RowState.FAILED,
        RowState.INDEXED,
    ]
    (letter,) = await world.dead_letters()
    assert letter.headers[HEADER_REASON] == ReasonCode.CORRUPT_IMAGE
    assert letter.headers[HEADER_OFFSET] == str(batch[1].offset)
    assert letter.value == batch[1].value


async def test_overwriting_a_good_picture_with_broken_bytes_removes_its_vector(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    await world.pipeline().process([await world.put("a.jpg", BROKEN)])
    assert await world.vector_content("a.jpg") is None
    assert await types_of(world, "a.jpg") == [OutcomeType.INDEXED, OutcomeType.FAILED]


async def test_what_cannot_be_parsed_is_put_aside_and_the_rest_goes_on(world: World) -> None:
    await world.pipeline().process([world.delivery(b"not json"), await world.put("a.jpg", b"one"), world.delivery(b"{}")])
    assert [letter.headers[HEADER_REASON] for letter in await world.dead_letters()] == ["EVENT_NOT_JSON", "EVENT_INVALID"]
    assert await world.vector_content("a.jpg") == content_hash_of(b"one")


async def test_equal_content_is_embedded_once_and_told_as_a_duplicate(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"same"), await world.put("b.jpg", b"same")])
    await world.pipeline().process([await world.put("c.jpg", b"same")])
    assert world.decoder.decoded == [b"same"]
    first = ObjectRef(BUCKET, "a.jpg").object_id.hex()
    duplicates = [outcome for outcome in await world.outcomes() if outcome.type is OutcomeType.DUPLICATE]
    assert {(one.data.key, one.data.duplicate_of) for one in duplicates} == {("b.jpg", first), ("c.jpg", first)}
    assert await world.vectors.count(COLLECTION) == 3


async def test_a_vector_of_other_bytes_is_not_reused(world: World) -> None:
    """The row of a.jpg still names the old content while another writer has already replaced its vector."""
    await world.pipeline().process([await world.put("a.jpg", b"same")])
    await world.pipeline().process([await world.put("x.jpg", b"other")])
    other = (await world.vectors.fetch(COLLECTION, [ObjectRef(BUCKET, "x.jpg").object_id])).popitem()[1]
    row = await world.row("a.jpg")
    assert row is not None
    await _overwrite_vector(world, "a.jpg", other.vector, content_hash_of(b"other"))
    await world.pipeline().process([await world.put("b.jpg", b"same")])
    (hit,) = await world.vectors.search(COLLECTION, vector_of(b"same"), limit=1)
    assert hit.object_id == ObjectRef(BUCKET, "b.jpg").object_id
    assert hit.similarity == pytest.approx(1.0, abs=1e-5)


async def _overwrite_vector(world: World, key: str, vector, content_hash) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    from schemas.vectors import VectorRow

    ref = ObjectRef(BUCKET, key)
    row = VectorRow(ref.object_id, vector, ref, content_hash, 0, 1, 40, 30, "JPEG")
    await world.vectors.upsert(COLLECTION, [row])


async def test_a_repair_embeds_anew_even_if_everything_seems_right(world: World) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    await _overwrite_vector(world, "a.jpg", -vector_of(b"one"), content_hash_of(b"one"))
    await world.pipeline().process([world.event(ObjectRef(BUCKET, "a.jpg"), cause=Cause.REPAIR)])
    (hit,) = await world.vectors.search(COLLECTION, vector_of(b"one"), limit=1)
    assert hit.similarity == pytest.approx(1.0, abs=1e-5)


async def test_after_the_database_was_lost_a_scan_takes_the_vectors_that_are_there(world: World) -> None:
    await world.pipeline().process([await world.put(f"{name}.jpg", name.encode()) for name in ("kept", "changed", "wrong")])
    before = await world.row("kept.jpg")
    await world.objects.put(ObjectRef(BUCKET, "changed.jpg"), b"changed later")
    await _overwrite_vector(world, "wrong.jpg", vector_of(b"other"), content_hash_of(b"other"))
    world.metadata._images.clear()
    world.metadata._image_models.clear()
    world.decoder.decoded.clear()
    await world.pipeline().process(
        [world.event(ObjectRef(BUCKET, f"{name}.jpg"), cause=Cause.SCAN) for name in ("kept", "changed", "wrong")]
    )
    assert sorted(world.decoder.decoded) == [b"changed later", b"wrong"]
    after = await world.row("kept.jpg")
    assert after is not None
    assert before is not None
    assert (after.width, after.height, after.format) == (before.width, before.height, before.format)
    for key in ("kept", "changed", "wrong"):
        row = await world.row(f"{key}.jpg")
        assert row is not None
        assert await world.vector_content(f"{key}.jpg") == row.content_hash


async def test_a_new_picture_is_not_looked_for_among_the_vectors(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would cost each put a query that finds nothing."""
    fetched: list[object] = []
    fetch = world.vectors.fetch

    async def noted(name: str, ids: Collection[ObjectId], *, strong: bool = False) -> dict[ObjectId, StoredVector]:
        fetched.append(ids)
        return await fetch(name, ids, strong=strong)

    monkeypatch.setattr(world.vectors, "fetch", noted)
    await world.pipeline().process([await world.put("new.jpg", b"new")])
    assert not fetched


async def test_a_repair_removes_an_orphan_vector(world: World) -> None:
    await _overwrite_vector(world, "ghost.jpg", vector_of(b"one"), content_hash_of(b"one"))
    await world.pipeline().process([world.event(ObjectRef(BUCKET, "ghost.jpg"), cause=Cause.REPAIR)])
    assert await world.vectors.count(COLLECTION) == 0
    assert await world.outcomes() == []


async def test_folders_and_excluded_keys_are_ignored_and_empty_objects_fail(world: World) -> None:
    batch = [await world.put("folder/", b""), await world.put("notes.txt", b"text"), await world.put("empty.jpg", b"")]
    await world.pipeline(exclude=("*.txt",)).process(batch)
    rows = {key: await world.row(key) for key in ("folder/", "notes.txt", "empty.jpg")}
    assert {key: (row.state, row.reason) for key, row in rows.items() if row} == {
        "folder/": (RowState.IGNORED, ReasonCode.DIRECTORY_MARKER),
        "notes.txt": (RowState.IGNORED, ReasonCode.EXCLUDED_BY_RULE),
        "empty.jpg": (RowState.FAILED, ReasonCode.EMPTY_OBJECT),
    }


async def test_an_object_that_is_too_large_fails_with_its_etag(world: World) -> None:
    await world.pipeline().process([await world.put("big.jpg", b"x" * 2000)])
    row = await world.row("big.jpg")
    assert row is not None
    assert (row.state, row.reason, row.size) == (RowState.FAILED, ReasonCode.OBJECT_TOO_LARGE, 2000)
    assert row.etag is not None


@pytest.mark.parametrize("key", ["../up.jpg", "a/./b.jpg", " "])
async def test_a_key_that_no_request_can_carry_fails_by_itself(world: World, key: str) -> None:
    await world.pipeline().process([world.event(ObjectRef(BUCKET, key)), await world.put("a.jpg", b"one")])
    row, neighbour = await world.row(key), await world.row("a.jpg")
    assert row is not None
    assert (row.state, row.reason) == (RowState.FAILED, ReasonCode.OBJECT_UNREADABLE)
    assert neighbour is not None
    assert neighbour.state is RowState.INDEXED


@pytest.mark.parametrize("reason", [ReasonCode.BUCKET_NOT_FOUND, ReasonCode.ACCESS_DENIED])
async def test_a_bucket_that_refuses_takes_nothing_out_of_the_index(world: World, reason: ReasonCode) -> None:
    await world.pipeline().process([await world.put("a.jpg", b"one")])
    changed, unseen = await world.put("a.jpg", b"two"), await world.put("b.jpg", b"three")

    async def refuse(_operation: Operation, _bucket: str, _key: str | None) -> None:
        raise StoreRefused(reason, "no")

    world.objects.before_call = refuse
    await world.pipeline().process([changed, unseen])
    row, other = await world.row("a.jpg"), await world.row("b.jpg")
    assert row is not None
    assert (row.state, row.content_hash) == (RowState.INDEXED, content_hash_of(b"one"))
    assert await world.vector_content("a.jpg") == content_hash_of(b"one")
    assert other is not None
    assert (other.state, other.reason) == (RowState.FAILED, reason)
    assert [letter.headers[HEADER_REASON] for letter in await world.dead_letters()] == [reason, reason]


async def test_an_object_that_a_well_store_does_not_give_fails_and_its_neighbours_do_not(world: World) -> None:
    batch = [await world.put("bad.jpg", b"one"), await world.put("good.jpg", b"two")]

    async def refuse(operation: Operation, _bucket: str, key: str | None) -> None:
        if operation is Operation.READ and key == "bad.jpg":
            raise StoreUnavailable("object store", "500")

    world.objects.before_call = refuse
    await world.pipeline().process(batch)
    bad, good = await world.row("bad.jpg"), await world.row("good.jpg")
    assert bad is not None
    assert (bad.state, bad.reason) == (RowState.FAILED, ReasonCode.OBJECT_UNREADABLE)
    assert good is not None
    assert good.state is RowState.INDEXED


async def test_an_object_overwritten_while_it_is_read_is_labelled_with_the_bytes_that_were_read(world: World) -> None:
    event = await world.put("a.jpg", b"one")

    async def overwrite(operation: Operation, _bucket: str, _key: str | None) -> None:
        if operation is Operation.READ:
            world.objects.before_call = _nothing
            await world.objects.put(ObjectRef(BUCKET, "a.jpg"), b"two")

    world.objects.before_call = overwrite
    await world.pipeline().process([event])
    row = await world.row("a.jpg")
    assert row is not None
    assert row.content_hash == content_hash_of(b"two") == await world.vector_content("a.jpg")
    assert row.etag == hashlib.md5(b"two", usedforsecurity=False).hexdigest()


async def _nothing(_operation: Operation, _bucket: str, _key: str | None) -> None:
    return None


async def test_a_bug_of_ours_costs_one_object(world: World) -> None:
    batch = [await world.put(key, key.encode()) for key in ("a.jpg", "poison.jpg", "c.jpg")]
    original = world.decoder._one

    def raising(item: bytes) -> object:
        if item == b"poison.jpg":
            raise RuntimeError("bug")
        return original(item)

    world.decoder._one = raising  # type: ignore[method-assign, assignment]
    await world.pipeline().process(batch)
    rows = [await world.row(key) for key in ("a.jpg", "poison.jpg", "c.jpg")]
    assert [row.state for row in rows if row] == [RowState.INDEXED, RowState.FAILED, RowState.INDEXED]
    assert rows[1] is not None
    assert rows[1].reason is ReasonCode.INTERNAL_ERROR
    assert len(await world.dead_letters()) == 1


async def test_a_large_batch_is_worked_on_in_groups_that_fit_the_memory_limit(world: World) -> None:
    batch: list[Delivery] = [await world.put(f"{number}.jpg", bytes([number]) * 900) for number in range(30)]
    await world.pipeline().process(batch)
    assert Counter(outcome.type for outcome in await world.outcomes()) == {OutcomeType.INDEXED: 30}
