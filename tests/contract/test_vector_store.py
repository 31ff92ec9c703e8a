"""One suite over Milvus and its twin. Writes are read back Strong: without it a read may lag by a tick or two."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from pymilvus import AsyncMilvusClient  # type: ignore[import-untyped]  # it has no types

from infra import vector_store
from infra.errors import ConfigurationError, StoreUnavailable
from infra.settings import CommonSettings
from infra.vector_store import MemoryVectorStore, VectorStore
from infra.vector_store.index import VectorIndex
from infra.vector_store.milvus import MOST_HITS
from schemas.filter import Filter
from schemas.identity import ModelFingerprint, ObjectId, ObjectRef, content_hash_of
from schemas.vectors import Vector, VectorRow, collection_name
from tests.conftest import Servers

DIMENSION = 16
FINGERPRINT = ModelFingerprint("c" * 64)


@dataclass(frozen=True)
class Collection:
    store: VectorStore
    name: str


@pytest.fixture(scope="module")
async def milvus(servers: Servers) -> AsyncIterator[Collection]:
    """One collection for the whole module: the server takes three seconds to make one. Each test leaves it empty."""
    store = await vector_store.connect(servers.settings)
    name = collection_name(FINGERPRINT, f"t{secrets.token_hex(4)}_")
    await store.create_collection(name, dimension=DIMENSION)
    yield Collection(store, name)
    await store.drop_collection(name)
    await store.close()


@pytest.fixture(params=["memory", "milvus"])
def real(request: pytest.FixtureRequest) -> Collection | None:
    """None: the twin's turn, for which no server is started."""
    found: Collection | None = request.getfixturevalue("milvus") if request.param == "milvus" else None
    return found


@pytest.fixture
async def collection(real: Collection | None) -> AsyncIterator[Collection]:
    if real is None:
        twin = MemoryVectorStore()
        await twin.create_collection("pictures", dimension=DIMENSION)
        yield Collection(twin, "pictures")
        return
    yield real
    while entries := await real.store.page(real.name, limit=5000):
        await real.store.delete(real.name, [entry.object_id for entry in entries])


@pytest.fixture
def store(collection: Collection) -> VectorStore:
    return collection.store


@pytest.fixture
def name(collection: Collection) -> str:
    return collection.name


def direction(number: int) -> Vector:
    """A unit vector that differs for each number."""
    vector = np.random.default_rng(number).normal(size=DIMENSION).astype(np.float32)
    unit: Vector = vector / np.float32(np.linalg.norm(vector))
    return unit


def row_of(key: str, number: int = 0, bucket: str = "images") -> VectorRow:
    ref = ObjectRef(bucket, key)
    content_hash = content_hash_of(f"{key} {number}".encode("utf-8", "surrogatepass"))
    return VectorRow(ref.object_id, direction(number), ref, content_hash, 1_700_000_000_000_000, 2**40, 640, 480, "jpeg")


async def found(store: VectorStore, name: str, *, narrow: Filter = Filter(), limit: int = 100) -> set[ObjectId]:
    return {hit.object_id for hit in await store.search(name, direction(0), limit=limit, narrow=narrow, strong=True)}


async def test_a_row_is_found_with_its_content_hash(store: VectorStore, name: str) -> None:
    rows = [row_of(f"{number}.jpg", number) for number in range(5)]
    await store.upsert(name, rows)
    hits = await store.search(name, direction(3), limit=3, strong=True)
    assert (hits[0].object_id, hits[0].content_hash) == (rows[3].object_id, rows[3].content_hash)
    assert hits[0].similarity == pytest.approx(1.0, abs=1e-5)
    expected = sorted((float(np.dot(row.vector, direction(3))) for row in rows), reverse=True)[:3]
    assert [hit.similarity for hit in hits] == pytest.approx(expected, abs=1e-5)


async def test_a_new_row_is_found_soon_without_strong(store: VectorStore, name: str) -> None:
    row = row_of("new.jpg")
    await store.upsert(name, [row])
    async with asyncio.timeout(5):
        while row.object_id not in {hit.object_id for hit in await store.search(name, direction(0), limit=1)}:
            await asyncio.sleep(0.02)


async def test_fetch_returns_what_was_written(store: VectorStore, name: str) -> None:
    rows = {row.object_id: row for row in (row_of(f"{number}.jpg", number) for number in range(3))}
    await store.upsert(name, list(rows.values()))
    absent = ObjectRef("images", "absent").object_id
    fetched = await store.fetch(name, [*rows, absent], strong=True)
    assert fetched.keys() == rows.keys()
    for object_id, stored in fetched.items():
        assert (stored.object_id, stored.content_hash) == (object_id, rows[object_id].content_hash)
        assert stored.vector.dtype == np.float32
        assert np.array_equal(stored.vector, rows[object_id].vector)
        row = rows[object_id]
        assert (stored.width, stored.height, stored.format) == (row.width, row.height, row.format)
    assert await store.fetch(name, []) == {}


async def test_an_upsert_replaces_and_the_last_of_a_batch_stands(store: VectorStore, name: str) -> None:
    await store.upsert(name, [row_of("a.jpg", 1)])
    last = row_of("a.jpg", 3)
    await store.upsert(name, [row_of("a.jpg", 2), row_of("b.jpg"), last])
    assert await store.count(name) == 2
    fetched = await store.fetch(name, [last.object_id], strong=True)
    assert fetched[last.object_id].content_hash == last.content_hash
    assert np.array_equal(fetched[last.object_id].vector, last.vector)
    await store.upsert(name, [])


async def test_deleted_rows_are_gone(store: VectorStore, name: str) -> None:
    rows = [row_of(f"{number}.jpg", number) for number in range(4)]
    await store.upsert(name, rows)
    await store.delete(name, [rows[0].object_id, rows[2].object_id, ObjectRef("images", "absent").object_id])
    await store.delete(name, [])
    assert await found(store, name) == {rows[1].object_id, rows[3].object_id}
    assert await store.count(name) == 2
    await store.upsert(name, [rows[0]])
    assert await store.count(name) == 3


KEYS = [
    "plain.jpg",
    "two words.jpg",
    'with "double" quotes',
    "with 'single' quotes",
    "back\\slash",
    'both \\" of them',
    "ends with \\",
    "\\u0041 \\x41 \\101 \\n",
    "line\nbreak\ttab\rreturn",
    "\x00\x01\x08\x0b\x0c\x1f\x7f",
    "ä/日本/写真.png",
    "😀",
    "\u2028\u2029\ufffd\ue000",
    "\U0010ffff",
    "100%_like%",
    "] or object_id > [",
    '" or key > "',
    "é" * 512,
    "x" * 1024,
]


async def test_every_key_is_its_own_prefix_and_nothing_elses(store: VectorStore, name: str) -> None:
    rows = [row_of(key, number) for number, key in enumerate(KEYS)]
    await store.upsert(name, rows)
    for row in rows:
        expected = {other.object_id for other in rows if other.ref.key.startswith(row.ref.key)}
        assert await found(store, name, narrow=Filter(prefix=row.ref.key)) == expected, row.ref.key
    assert {entry.ref.key for entry in await store.page(name)} == set(KEYS)


async def test_a_key_that_is_not_utf8_is_written_all_the_same(store: VectorStore, name: str) -> None:
    row = row_of("\udcff.jpg")
    await store.upsert(name, [row])
    assert await found(store, name) == {row.object_id}
    assert await found(store, name, narrow=Filter(prefix="\udcff")) == {row.object_id}


async def test_a_search_is_narrowed_to_bucket_and_prefix(store: VectorStore, name: str) -> None:
    places = [("images", "a/1"), ("images", "a/2"), ("images", "b/1"), ("others", "a/1"), ("images", "A/1")]
    rows = {place: row_of(place[1], number, place[0]) for number, place in enumerate(places)}
    await store.upsert(name, list(rows.values()))
    for narrow in (Filter("images"), Filter(prefix="a/"), Filter("images", "a/"), Filter("nowhere"), Filter()):
        expected = {row.object_id for row in rows.values() if narrow.matches(row)}
        assert await found(store, name, narrow=narrow) == expected


async def test_a_large_limit_brings_all_rows(store: VectorStore, name: str) -> None:
    rows = [row_of(f"{number}.jpg", number) for number in range(1300)]
    await store.upsert(name, rows)
    for limit in (1000, 1200):
        hits = await store.search(name, direction(0), limit=limit, strong=True)
        assert len({hit.object_id for hit in hits}) == limit
        assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    nearest = sorted(rows, key=lambda row: -float(np.dot(row.vector, direction(0))))[:10]
    hits = await store.search(name, direction(0), limit=10)
    assert [hit.object_id for hit in hits] == [row.object_id for row in nearest]
    fetched = await store.fetch(name, [row.object_id for row in rows])
    assert len(fetched) == len(rows)
    await store.delete(name, [row.object_id for row in rows[:1250]])
    assert await store.count(name) == 50


@pytest.mark.parametrize("limit", [1, 20, 1000, 1200, MOST_HITS])
def test_the_search_effort_is_what_an_indexed_segment_takes(limit: int) -> None:
    assert max(64, 2 * limit) == VectorIndex().effort(limit) <= 32_768


async def test_pages_bring_every_row_once_in_the_order_of_ids(store: VectorStore, name: str) -> None:
    rows = [row_of(f"{number}.jpg", number) for number in range(250)]
    await store.upsert(name, rows)
    entries, after = [], None
    while page := await store.page(name, after=after, limit=100):
        entries += page
        after = page[-1].object_id
    assert [entry.object_id for entry in entries] == sorted(row.object_id for row in rows)
    by_id = {row.object_id: row for row in rows}
    assert all(entry.ref == by_id[entry.object_id].ref for entry in entries)
    assert all(entry.content_hash == by_id[entry.object_id].content_hash for entry in entries)


async def test_an_id_that_is_there_twice_is_paged_twice(milvus: Collection, servers: Servers) -> None:
    """Nothing of ours can make one: another client writes the same id twice in one request, and a query shows only one."""
    rows = [row_of(f"{number}.jpg", number) for number in range(7)]
    await milvus.store.upsert(milvus.name, rows)
    token = servers.settings.milvus_token.get_secret_value()
    client = AsyncMilvusClient(servers.settings.milvus_uri, token=token, dedicated=True, timeout=10)
    row = {
        "object_id": rows[2].object_id.hex(),
        "vector": rows[2].vector,
        "bucket": "images",
        "key": "2.jpg",
        "content_hash": rows[2].content_hash.hex(),
        "put_time": 1,
        "size": 1,
        "width": 1,
        "height": 1,
        "format": "jpeg",
        "metadata": {},
    }
    await client.insert(milvus.name, [row, row], timeout=10)
    await client.close()
    paged = [entry.object_id for entry in await milvus.store.page(milvus.name)]
    assert set(paged) == {row.object_id for row in rows}
    assert {object_id for object_id in paged if paged.count(object_id) > 1} == {rows[2].object_id}
    # An upsert puts it right.
    await milvus.store.upsert(milvus.name, [rows[2]])
    assert await milvus.store.count(milvus.name) == len(rows)
    await milvus.store.delete(milvus.name, [row.object_id for row in rows])


async def test_an_empty_collection_is_empty(store: VectorStore, name: str) -> None:
    assert await store.count(name) == 0
    assert await store.page(name) == []
    assert await store.search(name, direction(0), limit=5, strong=True) == []
    await store.check(name)


async def test_a_collection_is_made_once_and_keeps_its_dimension(store: VectorStore, name: str) -> None:
    await store.upsert(name, [row_of("a.jpg")])
    await store.create_collection(name, dimension=DIMENSION)
    assert await store.count(name) == 1
    with pytest.raises(ConfigurationError, match=f"{DIMENSION} dimensions"):
        await store.create_collection(name, dimension=DIMENSION + 1)


async def test_a_collection_that_is_not_there_names_the_command(store: VectorStore, name: str) -> None:
    missing = f"{name}_missing"
    assert await store.has_collection(name)
    assert not await store.has_collection(missing)
    await store.drop_collection(missing)
    for call in (store.check(missing), store.count(missing), store.upsert(missing, [row_of("a.jpg")])):
        with pytest.raises(ConfigurationError, match="run: image-search upgrade"):
            await call


@pytest.mark.parametrize(
    "vector",
    [
        np.ones(DIMENSION + 1, dtype=np.float32),
        np.full(DIMENSION, np.nan, dtype=np.float32),
        np.full(DIMENSION, np.inf, dtype=np.float32),
    ],
)
async def test_what_is_no_vector_is_refused_at_once(store: VectorStore, name: str, vector: Vector) -> None:
    with pytest.raises(ValueError, match="finite"):
        await store.upsert(name, [row_of("good.jpg"), replace(row_of("bad.jpg"), vector=vector)])
    with pytest.raises(ValueError, match="finite"):
        await store.search(name, vector, limit=1)
    assert await store.count(name) == 0


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    settings = CommonSettings.model_validate({"milvus_uri": "http://127.0.0.1:1", "milvus_timeout_seconds": 2})
    store = await vector_store.connect(settings)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await store.count("anything")
    await store.close()
