"""One language, three translators: what a filter means in memory, SQL and Milvus select, too."""

from __future__ import annotations

import itertools
import operator
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from infra import vector_store
from infra.metadata_store import MemoryMetadataStore, MetadataStore, SqlMetadataStore, upgrade_schema
from infra.metadata_store.engine import Database, parse_url
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.settings import CommonSettings
from infra.vector_store import MemoryVectorStore, VectorStore
from schemas.filter import Filter, within_bounds
from schemas.identity import ModelFingerprint, ObjectId, ObjectRef, content_hash_of
from schemas.tables import RowState
from schemas.vectors import Vector, VectorRow, collection_name
from tests.conftest import Servers, settings_on
from tests.filters import NASTY_KEYS, NUMBERS, SIZES, TIMES_US, Json, filters, group_of, rows, within, written_time

DIRECTION: Vector = np.array([1.0, 0.0], dtype=np.float32)


class Selecting(Protocol):
    """`whole`: it holds only objects of which everything is known."""

    whole: bool

    async def put(self, objects: Sequence[ImageRow]) -> None: ...

    async def select(self, narrow: Filter) -> set[ObjectId]: ...


@dataclass
class Rows:
    store: MetadataStore
    whole = False

    async def put(self, objects: Sequence[ImageRow]) -> None:
        assert await self.store.write([RowWrite(row, 0) for row in objects]) == set()

    async def select(self, narrow: Filter) -> set[ObjectId]:
        listed = await self.store.list_rows(bucket=narrow.bucket, prefix=narrow.prefix, where=narrow.where)
        return {row.object_id for row in listed}


@dataclass
class Vectors:
    store: VectorStore
    name: str
    whole = True

    async def put(self, objects: Sequence[ImageRow]) -> None:
        await self.store.upsert(self.name, [_vector_row(row) for row in objects])

    async def select(self, narrow: Filter) -> set[ObjectId]:
        hits = await self.store.search(self.name, DIRECTION, limit=200, narrow=narrow, strong=True)
        return {hit.object_id for hit in hits}


def _vector_row(row: ImageRow) -> VectorRow:
    known = (row.content_hash, row.put_time_us, row.size, row.width, row.height, row.format)
    content_hash, put_time_us, size, width, height, name = known
    assert content_hash is not None and put_time_us is not None and size is not None
    assert width is not None and height is not None and name is not None
    return VectorRow(row.object_id, DIRECTION, row.ref, content_hash, put_time_us, size, width, height, name)


@dataclass(frozen=True)
class Kind:
    """Which store, and the servers that it needs."""

    name: str
    servers: Servers | None


@pytest.fixture(scope="module", params=["memory-rows", "sqlite", "mariadb", "memory-vectors", "milvus"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "mariadb":
        return Kind(request.param, request.getfixturevalue("full_servers"))
    return Kind(request.param, request.getfixturevalue("servers") if request.param == "milvus" else None)


@pytest.fixture(scope="module")
async def store(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Selecting]:
    folder = tmp_path_factory.mktemp("filter")
    if kind.name == "memory-rows":
        yield Rows(MemoryMetadataStore())
    elif kind.name == "memory-vectors":
        twin = MemoryVectorStore()
        await twin.create_collection("pictures", dimension=2)
        yield Vectors(twin, "pictures")
    elif kind.name == "milvus":
        assert kind.servers is not None
        vectors = await vector_store.connect(kind.servers.settings)
        name = collection_name(ModelFingerprint("d" * 64), f"t{secrets.token_hex(4)}_")
        await vectors.create_collection(name, dimension=2)
        yield Vectors(vectors, name)
        await vectors.drop_collection(name)
        await vectors.close()
    else:
        url = f"sqlite+aiosqlite:///{folder}/metadata.db"
        if kind.servers is not None:
            url = settings_on(kind.servers, folder)(CommonSettings).database_url.get_secret_value()
        await upgrade_schema(CommonSettings.model_validate({"database_url": url}))
        metadata = SqlMetadataStore(Database(parse_url(url), pool_size=2, timeout_seconds=20))
        yield Rows(metadata)
        await metadata.close()


def fresh_buckets() -> list[str]:
    """What earlier examples left behind is in other buckets."""
    name = f"t{secrets.token_hex(6)}"
    return [f"{name}.a", f"{name}.b"]


# Not shrunk: on real servers that takes longer than a test may.
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.reuse, Phase.generate])
@given(data=st.data())
async def test_every_store_selects_what_the_filter_means(store: Selecting, data: st.DataObject) -> None:
    buckets = fresh_buckets()
    objects = data.draw(rows(buckets, whole=store.whole))
    await store.put(objects)
    for narrow in data.draw(st.lists(filters(buckets), min_size=1, max_size=5)):
        assert await store.select(narrow) == {row.object_id for row in objects if narrow.matches(row)}, narrow


async def test_every_key_is_told_from_every_other(store: Selecting) -> None:
    buckets = fresh_buckets()
    refs = [ObjectRef(buckets[0], key) for key in NASTY_KEYS]
    await store.put([_known(ref) for ref in refs])

    async def selected(document: Json) -> set[str]:
        ids = await store.select(Filter(where=group_of({"must": [within(buckets)], **document})))
        return {ref.key for ref in refs if ref.object_id in ids}

    for key in NASTY_KEYS:
        same: Json = {"field": "key", "match": {"value": key}}
        starting: Json = {"field": "key", "match": {"prefix": key}}
        begins = {other for other in NASTY_KEYS if other.startswith(key)}
        assert await selected({"should": [same]}) == {key}
        assert await selected({"must_not": [same]}) == set(NASTY_KEYS) - {key}
        assert await selected({"should": [starting]}) == begins
        assert await selected({"must_not": [starting]}) == set(NASTY_KEYS) - begins
    every: Json = {"field": "key", "match": {"any": NASTY_KEYS}}
    assert await selected({"should": [every]}) == set(NASTY_KEYS)


@pytest.mark.parametrize("field", ["size", "width", "put_time"])
async def test_every_bound_is_where_it_says(store: Selecting, field: str) -> None:
    buckets = fresh_buckets()
    amounts = {"size": SIZES, "width": NUMBERS, "put_time": TIMES_US}[field]
    column = "put_time_us" if field == "put_time" else field
    objects = [_known(ObjectRef(buckets[0], str(amount)), **{column: amount}) for amount in amounts]
    await store.put(objects)
    signs = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
    for bound, (name, holds) in itertools.product(amounts, signs.items()):
        written = written_time(bound) if field == "put_time" else bound
        asked = {"must": [within(buckets), {"field": field, "range": {name: written}}]}
        expected = {str(amount) for amount in amounts if holds(amount, bound)}
        found = await store.select(Filter(where=group_of(asked)))
        assert {row.ref.key for row in objects if row.object_id in found} == expected, asked


async def test_the_largest_filter_is_answered(store: Selecting) -> None:
    """As many groups inside each other, conditions and values as are let in, all of which the store has to look at."""
    buckets = fresh_buckets()
    await store.put([_known(ObjectRef(buckets[0], "a.jpg"))])
    document: Json = {"must_not": [{"field": "size", "match": {"any": list(range(2000, 2190))}}]}
    for number in range(3):
        document = {
            "must": [document, within(buckets)],
            "should": [{"field": "key", "match": {"prefix": f"{number}{digit}"}} for digit in range(17)]
            + [{"field": "key", "match": {"value": "a.jpg"}}],
        }
    largest = Filter(where=within_bounds(group_of({"must": [document]})))
    assert await store.select(largest) == {ObjectRef(buckets[0], "a.jpg").object_id}


def _known(ref: ObjectRef, **changes: Any) -> ImageRow:
    facts: dict[str, Any] = {"content_hash": content_hash_of(b"a"), "put_time_us": 1_700_000_000_000_000, "size": 1000}
    return ImageRow(ref, RowState.INDEXED, 1, 0, **{**facts, "width": 640, "height": 480, "format": "JPEG", **changes})
