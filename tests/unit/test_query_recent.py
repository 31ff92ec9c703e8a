"""Vectors that are remembered: of which pictures, for which model, and how many."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from infra.errors import ImageRejected
from query_service import recent as module
from query_service.recent import RecentVectors
from query_service.search import Picture, SearchRequest
from schemas.identity import ContentHash, ModelFingerprint, content_hash_of
from schemas.vectors import Vector
from tests.query_world import FINGERPRINT, QueryWorld, picture

OTHER = ModelFingerprint("e" * 64)


class Embedding:
    """Counts, and gives a row of a batch."""

    def __init__(self) -> None:
        self.times = 0

    async def __call__(self) -> Vector:
        self.times += 1
        row: Vector = np.full((4, 2), self.times, dtype=np.float32)[1]
        return row


async def test_the_same_bytes_are_embedded_once_for_each_model() -> None:
    recent, embed = RecentVectors(8), Embedding()
    first = await recent.vector_of(b"a", FINGERPRINT, embed)
    again = await recent.vector_of(b"a", FINGERPRINT, embed)
    assert again is first
    assert embed.times == 1
    assert (await recent.vector_of(b"a", OTHER, embed)).tolist() == [2, 2]
    assert (await recent.vector_of(b"b", FINGERPRINT, embed)).tolist() == [3, 3]


async def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    recent, embed = RecentVectors(2), Embedding()
    for data in (b"a", b"b", b"a", b"c"):
        await recent.vector_of(data, FINGERPRINT, embed)
    assert (len(recent), embed.times) == (2, 3)
    await recent.vector_of(b"a", FINGERPRINT, embed)
    assert embed.times == 3
    await recent.vector_of(b"b", FINGERPRINT, embed)
    assert embed.times == 4


async def test_none_are_kept_when_told_so() -> None:
    recent, embed = RecentVectors(0), Embedding()
    for _ in range(2):
        await recent.vector_of(b"a", FINGERPRINT, embed)
    assert (len(recent), embed.times) == (0, 2)


async def test_what_is_kept_holds_no_batch_and_cannot_be_changed() -> None:
    vector = await RecentVectors(1).vector_of(b"a", FINGERPRINT, Embedding())
    assert vector.base is None
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 1


async def test_large_pictures_are_hashed_elsewhere_to_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    recent, embed = RecentVectors(8), Embedding()
    data = bytes(module.HASHED_HERE_BYTES + 1)
    threads: list[int] = []

    def noted(data: bytes) -> ContentHash:
        threads.append(threading.get_ident())
        return content_hash_of(data)

    monkeypatch.setattr(module, "content_hash_of", noted)
    await recent.vector_of(data, FINGERPRINT, embed)
    monkeypatch.setattr(module, "HASHED_HERE_BYTES", len(data))
    await recent.vector_of(data, FINGERPRINT, embed)
    assert [thread == threading.get_ident() for thread in threads] == [False, True]
    assert embed.times == 1


async def test_a_search_with_remembered_bytes_neither_decodes_nor_embeds_and_answers_the_same() -> None:
    world = await QueryWorld().start()
    for angle in (0, 30, 90):
        await world.put(f"{angle}.jpg", angle)
    searcher, request = world.searcher(RecentVectors(8)), SearchRequest(limit=3)
    first = await searcher.search([(1.0, Picture(picture(10)))], request)
    again = await searcher.search([(1.0, Picture(picture(10)))], request)
    unremembered = await world.searcher().search([(1.0, Picture(picture(10)))], request)
    assert first.hits == again.hits == unremembered.hits
    assert (again.timing_ms.decode, again.timing_ms.embed) == (None, None)
    assert first.timing_ms.decode is not None


async def test_a_picture_that_is_refused_is_refused_again() -> None:
    recent = RecentVectors(8)
    searcher = (await QueryWorld().start()).searcher(recent)
    for _ in range(2):
        with pytest.raises(ImageRejected):
            await searcher.search([(1.0, Picture(b"no picture"))], SearchRequest(limit=1))
    assert len(recent) == 0
