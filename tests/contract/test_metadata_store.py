"""One suite over the metadata store and its twin.

SQLite needs no server, so it always runs; MariaDB is that of the full profile. IMAGE_SEARCH_TEST_DATABASE_URL adds a database
on any other server, MySQL for one: it is emptied first.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from infra.metadata_store import MemoryMetadataStore, MetadataStore, SqlMetadataStore, upgrade_schema
from infra.metadata_store.engine import Database, parse_url
from infra.metadata_store.interface import Cursor, ImageRow, ModelRow, RowWrite
from infra.settings import CommonSettings
from schemas.events import Cause, Outcome, OutcomeType, ReasonCode, outcome_event
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef, content_hash_of
from schemas.tables import JobState, ModelState, RowState, log_cursor_name, metadata
from tests.conftest import FreshSettings

SERVER_URL = os.environ.get("IMAGE_SEARCH_TEST_DATABASE_URL")
KINDS = ["memory", "sqlite", "mariadb", *(["server"] if SERVER_URL else [])]
MODEL = ModelFingerprint("a" * 64)
OTHER_MODEL = ModelFingerprint("b" * 64)
BYTES = content_hash_of(b"picture")


@dataclass
class Clock:
    now_us: int = 1_000_000

    def __call__(self) -> int:
        return self.now_us


@dataclass
class Stores:
    """`store`, and others like it on the same data, as other processes have them."""

    store: MetadataStore
    clock: Clock
    another: Callable[[], MetadataStore]
    opened: list[MetadataStore] = field(default_factory=list)


async def _empty(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
        await connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
    await engine.dispose()


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """None: the twin's turn, for which no server is started."""
    if request.param == "mariadb":
        full_settings: FreshSettings = request.getfixturevalue("full_settings")
        return full_settings(CommonSettings).database_url.get_secret_value()
    return {"sqlite": f"sqlite+aiosqlite:///{tmp_path}/metadata.db", "server": SERVER_URL}.get(request.param)


@pytest.fixture
async def stores(database_url: str | None) -> AsyncIterator[Stores]:
    clock = Clock()
    if database_url is None:
        twin = MemoryMetadataStore(clock)
        yield Stores(twin, clock, lambda: twin)
        return
    url = database_url
    if url == SERVER_URL:
        await _empty(url)
    await upgrade_schema(CommonSettings.model_validate({"database_url": url}))
    opened: list[MetadataStore] = []

    def another() -> MetadataStore:
        opened.append(SqlMetadataStore(Database(parse_url(url), pool_size=5, timeout_seconds=20), clock))
        return opened[-1]

    yield Stores(another(), clock, another, opened)
    for store in opened:
        await store.close()


@pytest.fixture
def store(stores: Stores) -> MetadataStore:
    return stores.store


def ref_of(key: str, bucket: str = "images") -> ObjectRef:
    return ObjectRef(bucket, key)


def row_of(
    ref: ObjectRef, generation: int = 1, state: RowState = RowState.INDEXED, content_hash: ContentHash | None = BYTES
) -> ImageRow:
    return ImageRow(ref, state, generation, published_generation=0, content_hash=content_hash)


def first_write(ref: ObjectRef, state: RowState = RowState.INDEXED, content_hash: ContentHash | None = BYTES) -> RowWrite:
    return RowWrite(row_of(ref, 1, state, content_hash), seen_generation=0, models=frozenset({MODEL}))


def next_write(row: ImageRow, state: RowState = RowState.INDEXED) -> RowWrite:
    row = replace(row, state=state, generation=row.generation + 1)
    return RowWrite(row, row.generation - 1, models=frozenset({MODEL}))


async def stored(store: MetadataStore, ref: ObjectRef) -> ImageRow:
    return (await store.rows([ref.object_id]))[ref.object_id]


def full_row(ref: ObjectRef) -> ImageRow:
    data = Outcome(bucket=ref.bucket, key=ref.key, object_id=ref.object_id.hex(), generation=1, cause=Cause.NOTIFICATION)
    event = outcome_event(OutcomeType.INDEXED, "local", datetime(2026, 1, 2, tzinfo=UTC), data)
    return ImageRow(
        ref,
        RowState.FAILED,
        generation=1,
        published_generation=0,
        content_hash=BYTES,
        md5=bytes(range(16)),
        etag='"quoted"',
        version="v1",
        put_time_us=1_700_000_000_123_456,
        size=2**40,
        format="jpeg",
        width=640,
        height=480,
        reason=ReasonCode.CORRUPT_IMAGE,
        message="it's \\ broken: 日本 😀",
        attempt=3,
        owed_outcomes=(event,),
        created_at_us=5,
        updated_at_us=6,
    )


# -- rows and the fence ------------------------------------------------------------------------------------------------

KEYS = ["a b.jpg", "a+b%20.jpg", "ä/日本/写真.png", "😀", "\x00\x01\xff", "x" * 1024, "with'\"\\quotes", "\udcff bytes"]


@pytest.mark.parametrize("key", KEYS)
async def test_a_row_comes_back_as_it_was_written(store: MetadataStore, key: str) -> None:
    ref = ref_of(key)
    row = row_of(ref) if "\udcff" in key else full_row(ref)
    row = replace(row, created_at_us=5, updated_at_us=6)
    assert await store.write([RowWrite(row, 0)]) == set()
    assert await store.rows([ref.object_id, ref_of("absent").object_id]) == {ref.object_id: row}


async def test_keys_compare_as_bytes(store: MetadataStore) -> None:
    refs = [ref_of(key) for key in ("A.jpg", "a.jpg", "a.jpg ", "á.jpg", "a\u0301.jpg")]
    assert await store.write([first_write(ref) for ref in refs]) == set()
    assert {row.ref for row in (await store.rows([ref.object_id for ref in refs])).values()} == set(refs)
    assert [row.ref.key for row in await store.list_rows(prefix="A")] == ["A.jpg"]
    assert await store.counts(prefix="a.jpg ") == {RowState.INDEXED: 1}


async def test_nothing_asked_nothing_answered(store: MetadataStore) -> None:
    assert await store.rows([]) == {}
    assert await store.models_of([]) == {}
    assert await store.write([]) == set()
    assert await store.indexed_with_content([]) == {}
    await store.mark_published({})


async def test_a_writer_that_saw_an_older_generation_loses_alone(store: MetadataStore) -> None:
    moved, steady, absent = ref_of("moved"), ref_of("steady"), ref_of("absent")
    await store.write([first_write(moved), first_write(steady)])
    await store.write([next_write(await stored(store, moved))])
    late = [next_write(row_of(moved, 1), RowState.FAILED), next_write(row_of(steady, 1)), next_write(row_of(absent, 1))]
    assert await store.write(late) == {moved.object_id, absent.object_id}
    assert (await stored(store, moved)).state is RowState.INDEXED
    assert (await stored(store, moved)).generation == 2
    assert (await stored(store, steady)).generation == 2
    assert absent.object_id not in await store.rows([absent.object_id])


async def test_who_saw_no_row_loses_to_one_that_is_there(store: MetadataStore) -> None:
    ref = ref_of("there")
    await store.write([first_write(ref)])
    assert await store.write([first_write(ref, RowState.IGNORED)]) == {ref.object_id}
    assert (await stored(store, ref)).state is RowState.INDEXED
    assert list(await store.models_of([ref.object_id])) == [ref.object_id]


async def test_a_write_that_breaks_the_rules_is_refused_whole(store: MetadataStore) -> None:
    good, bad = first_write(ref_of("good")), ref_of("bad")
    with pytest.raises(ValueError, match="twice"):
        await store.write([good, good])
    with pytest.raises(ValueError, match="does not follow"):
        await store.write([good, RowWrite(row_of(bad, 3), seen_generation=1)])
    with pytest.raises(ValueError, match="no known bytes"):
        await store.write([good, first_write(bad, content_hash=None)])
    assert await store.counts() == {}


async def test_models_follow_the_row(store: MetadataStore) -> None:
    ref = ref_of("picture")
    row = row_of(ref)
    await store.write([RowWrite(row, 0, frozenset({MODEL, OTHER_MODEL}))])
    assert await store.models_of([ref.object_id]) == {ref.object_id: {MODEL: BYTES, OTHER_MODEL: BYTES}}
    new_bytes = content_hash_of(b"new")
    await store.write([RowWrite(replace(row, generation=2, content_hash=new_bytes), 1, frozenset({MODEL}))])
    assert await store.models_of([ref.object_id]) == {ref.object_id: {MODEL: new_bytes}}


@pytest.mark.parametrize("state", [RowState.DELETED, RowState.FAILED, RowState.IGNORED])
async def test_a_row_that_is_not_indexed_has_no_models(store: MetadataStore, state: RowState) -> None:
    ref = ref_of("picture")
    await store.write([first_write(ref)])
    await store.write([next_write(await stored(store, ref), state)])
    assert await store.models_of([ref.object_id]) == {}


async def test_times_that_the_writer_left_out_are_filled_in(stores: Stores) -> None:
    store, ref = stores.store, ref_of("picture")
    stores.clock.now_us = 100
    await store.write([first_write(ref)])
    stores.clock.now_us = 200
    await store.write([next_write(row_of(ref))])
    row = await stored(store, ref)
    assert (row.created_at_us, row.updated_at_us) == (100, 200)


async def test_a_message_is_cut_and_cleaned_rather_than_refused(store: MetadataStore) -> None:
    ref = ref_of("picture")
    await store.write([RowWrite(replace(row_of(ref), message="\udcff" + "é" * 600), 0)])
    assert (await stored(store, ref)).message == "?" + "é" * 511


async def test_of_many_writers_one_wins_each_generation(stores: Stores) -> None:
    refs = [ref_of(f"key-{number}") for number in range(5)]
    wins = 0

    async def write_often(store: MetadataStore, order: int) -> None:
        nonlocal wins
        for _ in range(10):
            rows = await store.rows([ref.object_id for ref in refs])
            writes = [next_write(rows[ref.object_id]) if ref.object_id in rows else first_write(ref) for ref in refs[::order]]
            losers = await store.write(writes)
            wins += len(writes) - len(losers)

    async with asyncio.TaskGroup() as writers:
        for number in range(4):
            writers.create_task(write_often(stores.another(), 1 if number % 2 else -1))
    rows = await stores.store.rows([ref.object_id for ref in refs])
    assert sum(row.generation for row in rows.values()) == wins
    assert len(rows) == len(refs)


# -- publication -------------------------------------------------------------------------------------------------------


async def test_publishing_the_present_generation_settles_it(store: MetadataStore) -> None:
    row = full_row(ref_of("picture"))
    await store.write([RowWrite(row, 0)])
    assert [owing.ref for owing in await store.unpublished()] == [row.ref]
    await store.mark_published({row.object_id: 1})
    assert await stored(store, row.ref) == row.with_published()
    assert await store.unpublished() == []


async def test_publishing_an_older_generation_keeps_what_the_newer_owes(store: MetadataStore) -> None:
    row = full_row(ref_of("picture"))
    await store.write([RowWrite(row, 0)])
    await store.write([RowWrite(replace(row, generation=2), 1)])
    await store.mark_published({row.object_id: 1})
    found = await stored(store, row.ref)
    assert (found.published_generation, found.owed_outcomes) == (1, row.owed_outcomes)
    assert not found.is_published


@pytest.mark.parametrize("generation", [1, 3])
async def test_publication_neither_goes_back_nor_ahead_of_the_row(store: MetadataStore, generation: int) -> None:
    row = row_of(ref_of("picture"))
    await store.write([RowWrite(row, 0)])
    await store.write([RowWrite(replace(row, generation=2), 1)])
    await store.mark_published({row.object_id: 2})
    await store.mark_published({row.object_id: generation, ref_of("absent").object_id: 1})
    assert (await stored(store, row.ref)).published_generation == 2


# -- questions ---------------------------------------------------------------------------------------------------------


async def test_known_content_is_found_oldest_first_and_at_most_eight(stores: Stores) -> None:
    store = stores.store
    refs = [ref_of(f"copy-{number}") for number in range(10)]
    for number, ref in enumerate(refs):
        stores.clock.now_us = 1000 - number
        await store.write([first_write(ref)])
    await store.write([next_write(await stored(store, refs[-1]), RowState.DELETED)])
    other = content_hash_of(b"other")
    await store.write([first_write(ref_of("other"), content_hash=other)])
    found = await store.indexed_with_content([BYTES, other, content_hash_of(b"unknown")])
    assert found == {BYTES: [ref.object_id for ref in refs[8:0:-1]], other: [ref_of("other").object_id]}


key_characters = st.sampled_from(
    ["a", "b", "A", " ", "/", "-", "%", "_", "\x00", "é", "\ud7ff", "\ue000", "日", "😀", "\U0010ffff"]
)
keys = st.text(key_characters, min_size=1, max_size=6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(names={"a", "a\x00", "a😀", "ab", "b", "A", "`", "\ud7ff", "\ue000"}, prefix="a", page=2)
@example(names={"\ud7ff", "\ud7ff日", "\ue000", "日"}, prefix="\ud7ff", page=2)
@given(names=st.sets(keys, min_size=1, max_size=12), prefix=st.text(key_characters, max_size=2), page=st.integers(1, 5))
async def test_pages_are_in_byte_order_and_prefixes_exact(stores: Stores, names: set[str], prefix: str, page: int) -> None:
    store = stores.store
    bucket = f"b{os.urandom(6).hex()}"
    await store.write([first_write(ref_of(name, bucket)) for name in names])
    listed: list[str] = []
    after: ObjectRef | None = None
    while rows := await store.list_rows(bucket=bucket, prefix=prefix, after=after, limit=page):
        assert len(rows) <= page
        after = rows[-1].ref
        listed += [row.ref.key for row in rows]
    assert listed == sorted((name for name in names if name.startswith(prefix)), key=str.encode)
    assert sum((await store.counts(bucket=bucket, prefix=prefix)).values()) == len(listed)


async def test_rows_are_listed_across_buckets_and_by_state(store: MetadataStore) -> None:
    await store.write(
        [
            first_write(ref_of("z", "alpha")),
            first_write(ref_of("a", "beta")),
            first_write(ref_of("b", "beta"), RowState.FAILED),
            first_write(ref_of("c", "beta"), RowState.IGNORED),
        ]
    )
    listed = [str(row.ref) for row in await store.list_rows()]
    assert listed == ["alpha/z", "beta/a", "beta/b", "beta/c"]
    assert [row.ref.key for row in await store.list_rows(after=ref_of("z", "alpha"), limit=2)] == ["a", "b"]
    assert [row.ref.key for row in await store.list_rows(after=ref_of("b", "beta"))] == ["c"]
    unsettled = {RowState.FAILED, RowState.IGNORED}
    assert [row.ref.key for row in await store.list_rows(states=unsettled)] == ["b", "c"]
    assert await store.counts() == {RowState.INDEXED: 2, RowState.FAILED: 1, RowState.IGNORED: 1}
    assert await store.counts(bucket="beta") == {RowState.INDEXED: 1, RowState.FAILED: 1, RowState.IGNORED: 1}


async def test_only_published_old_deleted_rows_are_purged(stores: Stores) -> None:
    store = stores.store
    stores.clock.now_us = 100
    old, owing, live = ref_of("old"), ref_of("owing"), ref_of("live")
    await store.write([first_write(old, RowState.DELETED), first_write(owing, RowState.DELETED), first_write(live)])
    await store.mark_published({old.object_id: 1, live.object_id: 1})
    stores.clock.now_us = 200
    young = ref_of("young")
    await store.write([first_write(young, RowState.DELETED)])
    await store.mark_published({young.object_id: 1})
    assert await store.purge_deleted(before_us=200) == 1
    assert {row.ref.key for row in await store.list_rows()} == {"owing", "live", "young"}
    assert await store.purge_deleted(before_us=201, limit=1) == 1
    assert await store.purge_deleted(before_us=201) == 0


# -- models ------------------------------------------------------------------------------------------------------------


def model_of(letter: str, state: ModelState) -> ModelRow:
    description = {"name": "resnet50", "mean": [0.1, 0.2]}
    return ModelRow(
        ModelFingerprint(letter * 64), "resnet50", f"images_{letter}", 512, "openvino", "fp32", description, state, 7
    )


async def test_a_model_is_added_once(store: MetadataStore) -> None:
    model = model_of("a", ModelState.ACTIVE)
    assert await store.add_model(model) == model
    assert await store.add_model(replace(model, name="renamed", created_at_us=9)) == model
    filling = await store.add_model(model_of("b", ModelState.FILLING))
    assert await store.models() == [model, filling]
    assert await store.models({ModelState.FILLING, ModelState.DROPPED}) == [filling]


async def test_there_is_one_active_model_however_many_try(stores: Stores) -> None:
    tries = [stores.another().add_model(model_of(letter, ModelState.ACTIVE)) for letter in "abcd"]
    results = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(result, ModelRow) for result in results) == 1
    assert sum(isinstance(result, ValueError) for result in results) == 3
    assert len(await stores.store.models({ModelState.ACTIVE})) == 1


# -- jobs --------------------------------------------------------------------------------------------------------------


async def test_jobs_are_taken_oldest_first_and_by_kind(stores: Stores) -> None:
    store = stores.store
    first = await store.add_job("scan", {"bucket": "images", "prefix": "日本/"})
    stores.clock.now_us += 1
    second = await store.add_job("scan", {})
    await store.add_job("reindex", {})
    assert await store.job(first.job_id) == first
    assert await store.job("nothing") is None
    assert await store.unfinished_jobs("scan") == [first, second]
    taken = [await store.claim_job(["scan"], owner="one", lease_seconds=10) for _ in range(3)]
    assert [job.job_id if job else None for job in taken] == [first.job_id, second.job_id, None]
    assert taken[0] is not None
    assert (taken[0].state, taken[0].owner, dict(taken[0].arguments)) == (JobState.RUNNING, "one", dict(first.arguments))
    assert await store.claim_job([], owner="one", lease_seconds=10) is None


async def test_a_job_has_one_owner_however_many_ask(stores: Stores) -> None:
    for _ in range(3):
        await stores.store.add_job("scan", {})
    asked = [stores.another().claim_job(["scan"], owner=f"owner-{n}", lease_seconds=10) for n in range(8)]
    taken = [job for job in await asyncio.gather(*asked) if job is not None]
    assert len(taken) == 3
    assert len({job.job_id for job in taken}) == 3


async def test_a_lease_that_ran_out_passes_the_job_on(stores: Stores) -> None:
    store = stores.store
    job = await store.add_job("scan", {})
    await store.claim_job(["scan"], owner="one", lease_seconds=10)

    async def report(owner: str, state: JobState = JobState.RUNNING) -> bool:
        return await store.update_job(
            job.job_id, owner=owner, state=state, progress={"done": 5}, message="five", lease_seconds=10
        )

    assert await report("one")
    assert not await report("two")
    stores.clock.now_us += 10_000_001
    assert not await report("one")
    passed_on = await store.claim_job(["scan"], owner="two", lease_seconds=10)
    assert passed_on is not None
    assert (passed_on.owner, dict(passed_on.progress)) == ("two", {"done": 5})
    assert not await report("one", JobState.DONE)
    assert await report("two", JobState.DONE)
    done = await store.job(job.job_id)
    assert done is not None
    assert (done.state, done.message, done.lease_until_us) == (JobState.DONE, "five", 0)
    assert not await report("two")
    assert await store.unfinished_jobs("scan") == []


# -- buckets -----------------------------------------------------------------------------------------------------------
async def test_buckets_are_added_and_taken_away(store: MetadataStore) -> None:
    assert await store.added_buckets() == []
    for bucket in ("b-two", "a.one", "b-two"):
        await store.add_bucket(bucket)
    assert await store.added_buckets() == ["a.one", "b-two"]
    assert await store.remove_bucket("a.one")
    assert not await store.remove_bucket("a.one")
    assert await store.added_buckets() == ["b-two"]


async def test_two_that_add_a_bucket_at_once(store: MetadataStore) -> None:
    await asyncio.gather(*(store.add_bucket("images") for _ in range(5)))
    assert await store.added_buckets() == ["images"]


async def test_a_bucket_that_is_added_again_begins_anew_in_the_log(store: MetadataStore) -> None:
    await store.save_cursor(log_cursor_name("images"), Cursor(5, clean=True))
    await store.add_bucket("images")
    assert await store.cursor(log_cursor_name("images")) is None
    await store.save_cursor(log_cursor_name("images"), Cursor(6, clean=False))
    await store.add_bucket("images")  # it is followed all the while
    assert await store.cursor(log_cursor_name("images")) == Cursor(6, clean=False)


# -- cursors and life --------------------------------------------------------------------------------------------------


async def test_a_cursor_is_kept_by_name(store: MetadataStore) -> None:
    assert await store.cursor("log") is None
    await store.save_cursor("log", Cursor(2**62, clean=False))
    assert await store.cursor("log") == Cursor(2**62, clean=False)
    await store.save_cursor("log", Cursor(5, clean=True))
    assert await store.cursor("log") == Cursor(5, clean=True)
    assert await store.cursor("other") is None


async def test_check_is_content(store: MetadataStore) -> None:
    await store.check()
