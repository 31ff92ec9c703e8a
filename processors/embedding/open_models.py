"""The models that are kept, each open on this host for as long as it is. Which they are may change at any time.

The table of models is the truth. A model that is added is opened beside the others; while it opens, they go on. One that is
dropped is closed when nobody uses it any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from infra.errors import ConfigurationError
from infra.metadata_store.interface import MetadataStore, ModelRow
from infra.settings import ProcessorSettings, QuerySettings
from processors.decode_pool import DecodePool
from processors.embedding import check_golden, open_embedder
from processors.embedding.catalog import description_of
from processors.embedding.embedder import Embedder
from schemas.identity import ModelFingerprint
from schemas.tables import KEPT_STATES, ModelState

log = structlog.get_logger(__name__)

RETRY_SECONDS = 30.0
"""Time after which a model that could not be opened is tried again."""

Opened = TypeVar("Opened")


@asynccontextmanager
async def model_of_row(
    row: ModelRow, settings: ProcessorSettings | QuerySettings
) -> AsyncIterator[tuple[DecodePool, Embedder]]:
    """The way from bytes to vectors of a model that the table names. Raises ConfigurationError that says what to do."""
    description = description_of(row)
    own = settings.model_copy(update={"model_precision": row.precision})
    async with AsyncExitStack() as stack:
        embedder = await open_embedder(description, own, lambda line: log.info("model", step=line))
        stack.push_async_callback(embedder.close)
        await check_golden(embedder, description)
        pool = DecodePool.from_settings(description.decode_rules(own), own)
        await pool.start()
        stack.push_async_callback(pool.close)
        log.info("model open", name=row.name, precision=row.precision, collection=row.collection)
        yield pool, embedder


@dataclass
class _Place(Generic[Opened]):
    """One model. Its task opens it, holds it, and closes it when it shall and nobody uses it."""

    row: ModelRow
    ready: asyncio.Future[Opened]
    users: int = 0
    retired: bool = False
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    failed_at: float | None = None

    @property
    def is_open(self) -> bool:
        return self.ready.done() and self.failed_at is None

    def settle(self) -> None:
        if self.retired and not self.users:
            self.unused.set()


class OpenModels(Generic[Opened]):
    """`open_model` opens what is needed of one row, for example a search by it."""

    def __init__(self, metadata: MetadataStore, open_model: Callable[[ModelRow], AbstractAsyncContextManager[Opened]]) -> None:
        self._metadata, self._open_model = metadata, open_model
        self._places: dict[ModelFingerprint, _Place[Opened]] = {}
        self._answering: _Place[Opened] | None = None

    async def start(self) -> None:
        """Returns when the active model is open. Raises ConfigurationError, and StoreUnavailable."""
        await self.refresh()
        await self._active()

    async def refresh(self) -> None:
        """Look at the table. Returns at once: what is new opens meanwhile."""
        rows = {row.fingerprint: row for row in await self._metadata.models(KEPT_STATES)}
        for fingerprint in self._places.keys() - rows.keys():
            self._retire(self._places.pop(fingerprint))
        for fingerprint, row in rows.items():
            place = self._places.get(fingerprint)
            if place is None or _is_to_be_tried_again(place):
                self._places[fingerprint] = self._opening(row)
            else:
                place.row = row

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[list[Opened]]:
        """All that are open, the active one first. They stay open until the context is left.

        While the active one is still being opened, the one that was active before comes first.
        """
        first = await self._active()
        others = [place for place in self._places.values() if place is not first and place.is_open]
        places = [first, *others]
        for place in places:
            place.users += 1
        try:
            yield [place.ready.result() for place in places]
        finally:
            for place in places:
                place.users -= 1
                place.settle()

    async def opened(self, fingerprint: ModelFingerprint) -> None:
        """Returns when this model is open here. Raises ConfigurationError when it cannot be opened, or is not kept."""
        await self.refresh()
        place = self._places.get(fingerprint)
        if place is None:
            raise ConfigurationError(f"the model {fingerprint[:16]} is not kept any more")
        await asyncio.shield(place.ready)

    @property
    def active_row(self) -> ModelRow | None:
        """The active model by the table, as last seen; it may still be being opened."""
        return next((place.row for place in self._places.values() if place.row.state is ModelState.ACTIVE), None)

    async def close(self) -> None:
        places = [*self._places.values()]
        self._places.clear()
        for place in places:
            if place.task is not None and not place.ready.done():
                place.task.cancel()
            self._retire(place)
        await asyncio.gather(*(place.task for place in places if place.task is not None), return_exceptions=True)

    async def _active(self) -> _Place[Opened]:
        active = next((place for place in self._places.values() if place.row.state is ModelState.ACTIVE), None)
        if active is None:
            raise ConfigurationError("no model has been set up yet. Run: image-search upgrade")
        before = self._answering
        if not active.is_open and before is not None and before.is_open and not before.retired:
            return before
        await asyncio.shield(active.ready)
        self._answering = active
        return active

    def _opening(self, row: ModelRow) -> _Place[Opened]:
        place: _Place[Opened] = _Place(row, asyncio.get_running_loop().create_future())
        place.task = asyncio.create_task(self._hold(place))
        return place

    async def _hold(self, place: _Place[Opened]) -> None:
        try:
            async with self._open_model(place.row) as opened:
                place.ready.set_result(opened)
                await place.unused.wait()
        except Exception as error:
            if place.ready.done():
                raise
            place.failed_at = time.monotonic()
            log.exception("model cannot be opened", name=place.row.name, state=place.row.state)
            place.ready.set_exception(error)
            place.ready.exception()  # looked at: nobody need be waiting for it

    @staticmethod
    def _retire(place: _Place[Opened]) -> None:
        place.retired = True
        place.settle()


def _is_to_be_tried_again(place: _Place[Opened]) -> bool:
    return place.failed_at is not None and time.monotonic() - place.failed_at > RETRY_SECONDS
