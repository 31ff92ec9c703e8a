"""Queries in front of the model: who waits, who goes together, and who hears of what."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from infra.errors import TransientError
from processors.embedding.embedder import Pixels, Vectors
from query_service.batching import BatchingEmbedder
from query_service.errors import RequestRefused
from schemas.api import ErrorCode
from tests.query_world import FINGERPRINT

BAD = 255


class GatedModel:
    """Answers a call when it is let go. A picture is a number, its vector that number; it fails on BAD."""

    fingerprint, dimension, input_size = FINGERPRINT, 1, (1, 1)

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = asyncio.Event()
        self.closed = 0

    async def embed(self, pixels: Pixels) -> Vectors:
        self.calls.append(pixels.ravel().tolist())
        await self.gate.wait()
        if BAD in pixels:
            raise TransientError("as told")
        return pixels.reshape(-1, 1).astype(np.float32)

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def model() -> GatedModel:
    return GatedModel()


def batching(model: GatedModel, pictures_at_once: int = 3, waiting: int = 16) -> BatchingEmbedder:
    return BatchingEmbedder(model, pictures_at_once=pictures_at_once, waiting=waiting)


def pictures(*numbers: int) -> Pixels:
    return np.array(numbers, dtype=np.uint8).reshape(-1, 1, 1, 1)


def asked(embedder: BatchingEmbedder, *numbers: int) -> list[asyncio.Task[Vectors]]:
    return [asyncio.create_task(embedder.embed(pictures(number))) for number in numbers]


async def settled() -> None:
    """Everything that can run has run."""
    for _ in range(20):
        await asyncio.sleep(0)


def answers_of(tasks: list[asyncio.Task[Vectors]]) -> Iterator[list[float]]:
    return (task.result().ravel().tolist() for task in tasks)


async def test_the_first_has_the_model_at_once_and_those_that_come_meanwhile_share_the_next_calls(model: GatedModel) -> None:
    embedder = batching(model)
    first = asked(embedder, 1)
    await settled()
    assert model.calls == [[1]]
    rest = asked(embedder, 2, 3, 4, 5)
    await settled()
    assert model.calls == [[1]], "the model has one call at a time"
    model.gate.set()
    await asyncio.gather(*first, *rest)
    assert model.calls == [[1], [2, 3, 4], [5]], "in the order of arrival, no more at once than told"
    assert list(answers_of([*first, *rest])) == [[1], [2], [3], [4], [5]]
    assert (await embedder.embed(pictures(9))).ravel().tolist() == [9], "idle again: the next starts anew"


async def test_a_caller_with_several_pictures_gets_all_of_its_rows(model: GatedModel) -> None:
    embedder = batching(model)
    first = asked(embedder, 1)
    await settled()
    several = [asyncio.create_task(embedder.embed(pictures(*numbers))) for numbers in ((2, 3), (4, 5), (6, 7, 8, 9), (10,))]
    await settled()
    model.gate.set()
    await asyncio.gather(*first, *several)
    assert model.calls == [[1], [2, 3], [4, 5], [6, 7, 8, 9], [10]]
    assert list(answers_of(several)) == [[2, 3], [4, 5], [6, 7, 8, 9], [10]]


async def test_only_the_picture_that_the_model_fails_on_hears_of_it(model: GatedModel) -> None:
    embedder = batching(model)
    first = asked(embedder, 1)
    await settled()
    good, bad, other = asked(embedder, 2, BAD, 3)
    await settled()
    model.gate.set()
    await asyncio.gather(*first, good, bad, other, return_exceptions=True)
    assert isinstance(bad.exception(), TransientError)
    assert list(answers_of([*first, good, other])) == [[1], [2], [3]]
    assert model.calls == [[1], [2, BAD, 3], [2], [BAD], [3]]


async def test_a_picture_of_another_shape_fails_alone(model: GatedModel) -> None:
    embedder = batching(model)
    first = asked(embedder, 1)
    await settled()
    good = asyncio.create_task(embedder.embed(pictures(2)))
    large = asyncio.create_task(embedder.embed(np.zeros((1, 2, 1, 1), dtype=np.uint8)))
    await settled()
    model.gate.set()
    await asyncio.gather(*first, good, large)
    assert list(answers_of([good])) == [[2]]


async def test_who_is_cancelled_disturbs_nobody(model: GatedModel) -> None:
    embedder = batching(model)
    running = asked(embedder, 1)
    await settled()
    waiting, gone, last = asked(embedder, 2, 3, 4)
    await settled()
    gone.cancel()
    running[0].cancel()
    await settled()
    model.gate.set()
    await asyncio.gather(waiting, last)
    assert model.calls == [[1], [2, 4]], "who left is not embedded"
    assert list(answers_of([waiting, last])) == [[2], [4]]
    assert gone.cancelled()
    assert running[0].cancelled()


async def test_one_too_many_is_refused_and_a_place_is_given_back(model: GatedModel) -> None:
    embedder = batching(model, waiting=2)
    running = asked(embedder, 1)
    await settled()
    waiting = asked(embedder, 2, 3)
    await settled()
    with pytest.raises(RequestRefused) as refused:
        await embedder.embed(pictures(4))
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (ErrorCode.TOO_MANY_REQUESTS, "1")
    waiting[0].cancel()
    await settled()
    late = asked(embedder, 5)
    await settled()
    model.gate.set()
    await asyncio.gather(*running, waiting[1], *late)
    assert model.calls == [[1], [3, 5]]


async def test_closing_ends_those_that_wait_and_lets_the_running_call_end(model: GatedModel) -> None:
    embedder = batching(model)
    running = asked(embedder, 1)
    await settled()
    waiting = asked(embedder, 2, 3)
    await settled()
    closing = asyncio.create_task(embedder.close())
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RequestRefused, RequestRefused]
    assert model.closed == 0, "not under its call"
    model.gate.set()
    await closing
    assert model.closed == 1
    assert list(answers_of(running)) == [[1]]
    with pytest.raises(RequestRefused):
        await embedder.embed(pictures(4))
    await embedder.close()


async def test_it_passes_for_the_model_it_wraps(model: GatedModel) -> None:
    embedder = batching(model)
    assert (embedder.fingerprint, embedder.dimension, embedder.input_size) == (FINGERPRINT, 1, (1, 1))
