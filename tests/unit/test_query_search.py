"""What a search shows: nearest first, nothing that its row does not stand for, one SQL query whatever the limit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigurationError, ImageRejected
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.metadata_store.memory import MemoryMetadataStore
from infra.vector_store.memory import MemoryVectorStore
from processors.embedding.active_model import active_model
from query_service import search as search_module
from query_service.errors import RequestRefused
from query_service.search import Picture, SearchRequest
from schemas.api import ErrorCode
from schemas.filter import Filter
from schemas.identity import ModelFingerprint, ObjectId, ObjectRef
from schemas.tables import RowState
from schemas.vectors import Vector, VectorHit
from tests.filters import group_of
from tests.query_world import BUCKET, FINGERPRINT, PUT_TIME_US, QueryWorld, active, picture, score_between


@pytest.fixture
async def world() -> QueryWorld:
    return await QueryWorld().start()


class CountingMetadata(MemoryMetadataStore):
    queries = 0

    async def rows(self, ids: Collection[ObjectId]) -> dict[ObjectId, ImageRow]:
        self.queries += 1
        return await super().rows(ids)


async def keys_found(world: QueryWorld, angle: int, request: SearchRequest) -> list[str]:
    return [hit.key for hit in (await world.searcher().search([(1.0, Picture(picture(angle)))], request)).hits]


async def test_hits_come_nearest_first_with_score_and_distance(world: QueryWorld) -> None:
    for angle in (0, 30, 60, 120):
        await world.put(f"{angle}.jpg", angle)
    answer = await world.searcher().search([(1.0, Picture(picture(10)))], SearchRequest(limit=3))
    assert [hit.key for hit in answer.hits] == ["0.jpg", "30.jpg", "60.jpg"]
    first = answer.hits[0]
    assert first.score == pytest.approx(score_between(10, 0), abs=0.01)
    assert first.distance == pytest.approx(2 - 2 * first.score / 100, abs=0.001)
    assert first.url == f"/v1/images/{first.id}/content"
    assert (answer.model, answer.limit, answer.lag_ms, answer.total_is_exact) == ("angles", 3, 430, False)
    assert answer.timing_ms.decode is not None


async def test_an_opposite_picture_scores_below_zero(world: QueryWorld) -> None:
    await world.put("far.jpg", 180)
    [hit] = (await world.searcher().search([(1.0, Picture(picture(0)))], SearchRequest(limit=1))).hits
    assert hit.score == pytest.approx(-100.0, abs=0.01)
    assert hit.distance == pytest.approx(4.0, abs=0.001)


@pytest.mark.parametrize("state", [RowState.FAILED, RowState.IGNORED, RowState.DELETED])
async def test_a_vector_whose_row_is_not_indexed_is_hidden(world: QueryWorld, state: RowState) -> None:
    await world.put("stays.jpg", 5)
    await world.put("gone.jpg", 0)
    await world.set_row(ObjectRef(BUCKET, "gone.jpg"), picture(0), state=state)
    assert await keys_found(world, 0, SearchRequest(limit=10)) == ["stays.jpg"]


async def test_a_vector_of_other_bytes_than_the_row_names_is_hidden(world: QueryWorld) -> None:
    await world.put("overwritten.jpg", 0)
    await world.set_row(ObjectRef(BUCKET, "overwritten.jpg"), picture(90))
    assert await keys_found(world, 0, SearchRequest(limit=10)) == []


async def test_a_vector_without_a_row_is_hidden(world: QueryWorld) -> None:
    await world.add_vector(ObjectRef(BUCKET, "no-row.jpg"), picture(0), 0)
    assert await keys_found(world, 0, SearchRequest(limit=10)) == []


async def test_hidden_hits_are_made_up_for_by_fetching_more(world: QueryWorld) -> None:
    for number in range(60):
        await world.add_vector(ObjectRef(BUCKET, f"ghost-{number}"), picture(0), number / 100)
    for number in range(10):
        await world.put(f"real-{number}", 10 + number)
    assert await keys_found(world, 0, SearchRequest(limit=10)) == [f"real-{number}" for number in range(10)]


async def test_fetching_more_has_a_bound(world: QueryWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    search = MemoryVectorStore.search

    async def counting(
        self: MemoryVectorStore, name: str, vector: Vector, *, limit: int, narrow: Filter, strong: bool
    ) -> list[VectorHit]:
        asked.append(limit)
        return await search(self, name, vector, limit=limit, narrow=narrow, strong=strong)

    monkeypatch.setattr(MemoryVectorStore, "search", counting)
    for number in range(500):
        await world.add_vector(ObjectRef(BUCKET, f"ghost-{number}"), picture(0), number / 100)
    assert await keys_found(world, 0, SearchRequest(limit=1)) == []
    assert asked == [9, 18, 36, 72]
    assert len(asked) == search_module.FETCHES


WIDE = group_of(
    {"must": [{"field": "width", "range": {"gte": 40}}], "must_not": [{"field": "format", "match": {"value": "png"}}]}
)


@pytest.mark.parametrize("narrow", [Filter(), Filter(where=WIDE)])
@pytest.mark.parametrize("limit", [1, 10, 1000])
async def test_one_sql_query_whatever_the_limit(limit: int, narrow: Filter) -> None:
    world = QueryWorld()
    world.metadata = metadata = CountingMetadata()
    await world.start()
    for number in range(150):
        await world.put(str(number), number)
    metadata.queries = 0
    await world.searcher().search([(1.0, Picture(picture(0)))], SearchRequest(limit=limit, narrow=narrow))
    assert metadata.queries == 1


async def test_min_score_cuts_and_does_not_fetch_more(world: QueryWorld) -> None:
    for angle in (0, 30, 60, 89):
        await world.put(f"{angle}", angle)
    assert await keys_found(world, 0, SearchRequest(limit=10, min_score=score_between(0, 61))) == ["0", "30", "60"]


async def test_bucket_and_prefix_narrow(world: QueryWorld) -> None:
    await world.put("a/1", 0)
    await world.put("b/1", 1)
    await world.put("a/1", 2, bucket="other")
    assert await keys_found(world, 0, SearchRequest(10, narrow=Filter(BUCKET, "a/"))) == ["a/1"]
    assert await keys_found(world, 0, SearchRequest(10, narrow=Filter(None, "b"))) == ["b/1"]


async def test_a_filter_narrows_and_the_row_has_the_last_word(world: QueryWorld) -> None:
    for key in ("a", "b", "c"):
        await world.put(key, 0)
    not_b = group_of({"must_not": [{"field": "key", "match": {"value": "b"}}]})
    assert await keys_found(world, 0, SearchRequest(10, narrow=Filter(where=not_b))) == ["a", "c"]
    # The same bytes put again later: the row has it already, the vector not yet.
    row = (await world.metadata.rows([ObjectRef(BUCKET, "a").object_id]))[ObjectRef(BUCKET, "a").object_id]
    later = replace(row, generation=row.generation + 1, put_time_us=PUT_TIME_US + 1)
    await world.metadata.write([RowWrite(later, row.generation, frozenset({FINGERPRINT}))])
    before = group_of({"must": [{"field": "put_time", "range": {"lt": "2023-11-14T22:13:20.123457Z"}}]})
    assert await keys_found(world, 0, SearchRequest(10, narrow=Filter(where=before))) == ["b", "c"]


async def test_what_is_no_picture_is_rejected(world: QueryWorld) -> None:
    with pytest.raises(ImageRejected):
        await world.searcher().search([(1.0, Picture(b"text"))], SearchRequest(10))


async def test_similar_leaves_the_object_itself_out_and_keeps_its_twins(world: QueryWorld) -> None:
    row = await world.put("one", 10)
    await world.put("same", 10)
    await world.put("near", 20)
    answer = await world.searcher().search([(1.0, row)], SearchRequest(limit=2))
    assert [hit.key for hit in answer.hits] == ["same", "near"]


async def test_similar_to_what_has_no_vector_is_refused(world: QueryWorld) -> None:
    failed = await world.set_row(ObjectRef(BUCKET, "broken"), b"broken", state=RowState.FAILED)
    with pytest.raises(RequestRefused) as refused:
        await world.searcher().search([(1.0, failed)], SearchRequest(limit=2))
    assert refused.value.code is ErrorCode.IMAGE_NOT_INDEXED


async def test_similar_never_searches_by_a_vector_of_other_bytes(world: QueryWorld) -> None:
    await world.put("one", 10)
    row = await world.set_row(ObjectRef(BUCKET, "one"), picture(90))
    with pytest.raises(RequestRefused) as refused:
        await world.searcher().search([(1.0, row)], SearchRequest(limit=2))
    assert refused.value.code is ErrorCode.IMAGE_NOT_INDEXED


@given(
    angles=st.lists(st.integers(0, 359), max_size=30),
    hidden=st.sets(st.integers(0, 29)),
    asked=st.integers(0, 359),
    limit=st.integers(1, 20),
)
async def test_always_the_nearest_of_what_stands(angles: list[int], hidden: set[int], asked: int, limit: int) -> None:
    world = await QueryWorld().start()
    for number, angle in enumerate(angles):
        await world.put(f"{number}", angle)
        if number in hidden:
            await world.set_row(ObjectRef(BUCKET, f"{number}"), picture(angle), state=RowState.FAILED)
    shown = (await world.searcher().search([(1.0, Picture(picture(asked)))], SearchRequest(limit))).hits
    standing = sorted(
        (score_between(asked, angle) for number, angle in enumerate(angles) if number not in hidden), reverse=True
    )
    assert [hit.score for hit in shown] == pytest.approx(standing[:limit], abs=0.01)
    assert len({hit.id for hit in shown}) == len(shown)


async def test_a_start_needs_the_model_that_made_the_collection() -> None:
    metadata = MemoryMetadataStore()
    with pytest.raises(ConfigurationError, match="image-search upgrade"):
        await active_model(metadata, FINGERPRINT, "angles")
    await metadata.add_model(active(ModelFingerprint("e" * 64)))
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_MODEL=angles"):
        await active_model(metadata, FINGERPRINT, "another")


async def test_a_start_with_other_weights_of_ones_own_is_told_which_they_were() -> None:
    metadata = MemoryMetadataStore()
    made_with = replace(active(ModelFingerprint("e" * 64)), name="own", description={"weights": {"sha256": "d" * 64}})
    await metadata.add_model(made_with)
    with pytest.raises(ConfigurationError, match=f"IMAGE_SEARCH_MODEL=own .*sha256 is {'d' * 64}"):
        await active_model(metadata, FINGERPRINT, "own")
