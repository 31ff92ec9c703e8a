"""Queries that come while the model is busy go to it together: a bounded queue in front of one model."""

from __future__ import annotations

import asyncio
from contextvars import Context

import numpy as np

from infra.metrics import QUERY_BATCH_PICTURES
from processors.embedding.embedder import Embedder, Pixels, Vectors
from query_service.errors import too_busy
from schemas.identity import ModelFingerprint

_Answer = asyncio.Future[Vectors]


class BatchingEmbedder:
    """An Embedder around another. Whoever finds the model idle has it at once; nobody is kept waiting for a batch to fill.

    Each caller gets its own rows or its own error, and may be cancelled without anyone else noticing.
    """

    def __init__(self, model: Embedder, *, pictures_at_once: int, waiting: int) -> None:
        """`pictures_at_once`: most of one call of the model. `waiting`: most callers that wait for their call."""
        self._model = model
        self._pictures_at_once = pictures_at_once
        self._room = waiting
        # In the order of arrival. Who is cancelled takes itself out.
        self._waiting: dict[_Answer, Pixels] = {}
        self._working: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def fingerprint(self) -> ModelFingerprint:
        return self._model.fingerprint

    @property
    def dimension(self) -> int:
        return self._model.dimension

    @property
    def input_size(self) -> tuple[int, int]:
        return self._model.input_size

    async def embed(self, pixels: Pixels) -> Vectors:
        """Raises RequestRefused when too many wait already or this is closed, and what the model raises for these pixels."""
        if self._closed:
            raise _closing()
        if len(self._waiting) >= self._room:
            raise too_busy("Too many pictures wait for the model. Try again.")
        answer: _Answer = asyncio.get_running_loop().create_future()
        self._waiting[answer] = pixels
        if self._working is None:
            # In a context of its own: it works for all, and must not log under the first one's request.
            self._working = asyncio.create_task(self._work(), context=Context())
        try:
            return await answer
        finally:
            self._waiting.pop(answer, None)

    async def close(self) -> None:
        """Refuses those that wait, lets the running call end, and closes the model. May be called twice."""
        self._closed = True
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(_closing())
        self._waiting.clear()
        if self._working is not None:
            await self._working
        await self._model.close()

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._embed(self._next())
        finally:
            self._working = None

    def _next(self) -> dict[_Answer, Pixels]:
        """As many of those that wait longest as one call takes, and at least one."""
        batch: dict[_Answer, Pixels] = {}
        pictures = 0
        for answer, pixels in self._waiting.items():
            pictures += len(pixels)
            if batch and pictures > self._pictures_at_once:
                break
            batch[answer] = pixels
        for answer in batch:
            del self._waiting[answer]
        return batch

    async def _embed(self, batch: dict[_Answer, Pixels]) -> None:
        try:
            pixels = list(batch.values())
            vectors = await self._model.embed(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
        except Exception as error:
            await self._each_alone(batch, error)
            return
        QUERY_BATCH_PICTURES.observe(len(vectors))
        start = 0
        for answer, own in batch.items():
            if not answer.done():
                answer.set_result(vectors[start : start + len(own)])
            start += len(own)

    async def _each_alone(self, batch: dict[_Answer, Pixels], error: Exception) -> None:
        """One of several may be what the call failed at: only that one is to hear of it."""
        for answer, pixels in batch.items():
            if answer.done():
                continue
            if len(batch) == 1:
                answer.set_exception(error)
            else:
                await self._embed({answer: pixels})


def _closing() -> Exception:
    return too_busy("The service is stopping. Try again.")
