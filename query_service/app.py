"""The query service put together: routes, middlewares, and a cleanup context a resource, opened in order, closed in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

import structlog
from aiohttp import web

from infra.errors import TransientError
from infra.followed_buckets import followed_buckets
from infra.health import Check
from infra.metadata_store.interface import ModelRow
from infra.retry import until_done
from infra.settings import QuerySettings
from processors.embedding.active_model import active_model, settled
from processors.embedding.open_models import OpenModels
from query_service.admission import Admission
from query_service.batching import BatchingEmbedder
from query_service.event_feed import EventFeed
from query_service.freshness import FreshnessFollower
from query_service.guard import allow_origins, audit, guard, scopes_of
from query_service.key_ring import KeyRing
from query_service.keys import (
    BROKER,
    CHECKS,
    CONTENTS,
    FEED,
    FRESHNESS,
    KEY_RING,
    METADATA,
    MODELS,
    OBJECTS,
    OPENAPI,
    SCOPES,
    SEARCHES,
    SETTINGS,
    SETTLING,
    STOPPING,
    UPLOADS,
    VECTORS,
)
from query_service.middlewares import add_safe_headers, observe, translate_errors
from query_service.openapi import document
from query_service.recent import RecentVectors
from query_service.resources import REAL, Resources
from query_service.routes import changes, events, failures, images, jobs, operations, page, search
from query_service.search import Searcher
from query_service.settled import Settling
from schemas.topics import PROCESSOR_GROUP

START_PATIENCE_SECONDS = 60.0
"""How long a start waits for the metadata store. A stack that starts everything at once has it within seconds."""

MODELS_POLL_SECONDS = 0.5
"""Time between looks at the table of models: how late a change of model is seen here."""

ENDPOINTS = (
    *page.ENDPOINTS,
    *search.ENDPOINTS,
    *images.ENDPOINTS,
    *changes.ENDPOINTS,
    *events.ENDPOINTS,
    *failures.ENDPOINTS,
    *jobs.ENDPOINTS,
    *operations.ENDPOINTS,
)

Context = Callable[[web.Application], AsyncIterator[None]]

log = structlog.get_logger(__name__)


class _Closable(Protocol):
    async def close(self) -> None: ...


Store = TypeVar("Store", bound=_Closable)


def init_app(settings: QuerySettings, resources: Resources = REAL) -> web.Application:
    """Opens nothing before the application starts. The start raises ConfigurationError and StoreUnavailable."""
    # Bodies are counted where they are read (upload.py). This is the fence for routes that take none.
    app = web.Application(middlewares=[observe, audit, translate_errors, guard], client_max_size=settings.max_object_bytes)
    app[SETTINGS] = settings
    app[OPENAPI] = document(ENDPOINTS, largest_limit=settings.max_limit)
    app[SCOPES] = scopes_of(ENDPOINTS)
    app[STOPPING] = asyncio.Event()
    app[SEARCHES] = Admission(
        at_once=settings.queries_at_once, waiting=settings.queries_waiting, bytes_at_once=settings.body_bytes_at_once
    )
    app[CONTENTS] = Admission(at_once=settings.contents_at_once, waiting=settings.contents_waiting)
    app[UPLOADS] = Admission(at_once=settings.uploads_at_once, waiting=settings.uploads_waiting)
    app.on_response_prepare.append(add_safe_headers)
    app.on_response_prepare.append(allow_origins)
    app.on_shutdown.append(_end_streams)
    app.cleanup_ctx.extend(
        [
            _store(OBJECTS, resources.objects),
            _store(METADATA, resources.metadata),
            _store(VECTORS, resources.vectors),
            _store(BROKER, resources.broker),
            _key_ring,
            _freshness,
            _searching(resources),
        ]
    )
    for endpoint in ENDPOINTS:
        app.router.add_route(endpoint.method, endpoint.route, endpoint.handler)
    return app


async def _end_streams(app: web.Application) -> None:
    app[STOPPING].set()


def _store(key: web.AppKey[Store], connect: Callable[[QuerySettings], Awaitable[Store]]) -> Context:
    async def context(app: web.Application) -> AsyncIterator[None]:
        app[key] = await connect(app[SETTINGS])
        yield
        await app[key].close()

    return context


async def _key_ring(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    ring = app[KEY_RING] = KeyRing(
        app[METADATA], requests_per_second=settings.key_requests_per_second, burst=settings.key_burst
    )
    writing = asyncio.create_task(ring.run())
    yield
    writing.cancel()
    with suppress(asyncio.CancelledError):
        await writing
    await ring.write_uses()


async def _freshness(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    app[FRESHNESS] = FreshnessFollower(
        broker=app[BROKER],
        metadata=app[METADATA],
        buckets=partial(followed_buckets, settings, app[METADATA]),
        group=PROCESSOR_GROUP,
        visibility_bound_seconds=settings.visibility_bound_seconds,
        notified=settings.follow == "notifications",
    )
    following = asyncio.create_task(app[FRESHNESS].run())
    yield
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following


def _searching(resources: Resources) -> Context:
    """Everything that needs the model. It comes last: a service that cannot search must not take requests."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        settings, metadata = app[SETTINGS], app[METADATA]
        await until_done(metadata.check, on_wait=_say_waiting, give_up_after_seconds=START_PATIENCE_SECONDS)
        settings = await settled(settings, metadata)
        # Before the model is loaded, or even downloaded: a wrong one should be refused at once.
        await active_model(metadata, resources.fingerprint(settings), settings.model)

        @asynccontextmanager
        async def searcher(row: ModelRow) -> AsyncIterator[Searcher]:
            async with resources.model(settings, row) as model:
                embedder = BatchingEmbedder(
                    model.embedder, pictures_at_once=settings.queries_embedded_at_once, waiting=settings.queries_at_once
                )
                yield Searcher(
                    model=row,
                    decode=model.decode,
                    embedder=embedder,
                    recent=RecentVectors(settings.recent_query_vectors),
                    vectors=app[VECTORS],
                    metadata=metadata,
                    freshness=app[FRESHNESS],
                )
                await embedder.close()

        app[MODELS] = models = OpenModels(metadata, searcher)
        try:
            await models.start()
            app[SETTLING] = Settling(metadata, app[OBJECTS], settings.wait_timeout_seconds)
            app[FEED] = EventFeed(app[BROKER], readers=settings.event_readers)
            app[CHECKS] = _checks(app)
            following = asyncio.create_task(_follow(models))
            yield
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
        finally:
            await models.close()

    return context


async def _follow(models: OpenModels[Searcher]) -> None:
    """A change of model is seen within half a second, by every query service; each answer is by one model."""
    while True:
        await asyncio.sleep(MODELS_POLL_SECONDS)
        try:
            await models.refresh()
        except TransientError as error:
            log.warning("models_unknown_just_now", error=str(error))


def _checks(app: web.Application) -> Mapping[str, Check]:
    async def buckets() -> None:
        followed = await followed_buckets(app[SETTINGS], app[METADATA])
        await asyncio.gather(*(app[OBJECTS].check(bucket) for bucket in followed))

    async def vectors() -> None:
        async with app[MODELS].in_use() as [searcher, *_]:
            collection = searcher.model.collection
        await app[VECTORS].check(collection)

    async def model() -> None:
        async with app[MODELS].in_use():
            pass

    return {
        "object_store": buckets,
        "metadata_store": app[METADATA].check,
        "vector_store": vectors,
        "broker": app[BROKER].check,
        "model": model,
    }


def _say_waiting(error: TransientError, attempt: int) -> None:
    log.warning("waiting_to_start", error=str(error), attempt=attempt)
