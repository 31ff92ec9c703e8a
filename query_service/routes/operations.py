"""For those who run it: state, health, metrics, and the description of this API."""

from __future__ import annotations

from importlib.metadata import version

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from infra.followed_buckets import followed_buckets
from infra.health import readiness
from query_service.endpoint import JSON, Endpoint, answer
from query_service.keys import CHECKS, FRESHNESS, METADATA, MODELS, OPENAPI, SETTINGS
from query_service.request import grant_of
from schemas.access import Open, Scope
from schemas.api import ErrorCode, Liveness, ModelStatus, Readiness, Status
from schemas.filter import Place
from schemas.tables import RowState
from schemas.vectors import COLLECTION_SCHEMA_VERSION


async def status(request: web.Request) -> web.Response:
    app = request.app
    settings, freshness = app[SETTINGS], app[FRESHNESS]
    async with app[MODELS].in_use() as [searcher, *_]:
        model = searcher.model
    grant = grant_of(request)
    # Places nest or are apart, and of those that nest a grant has the outer one: no object counts twice.
    parts = [await app[METADATA].counts(bucket=place.bucket, prefix=place.prefix) for place in grant.places or (Place(),)]
    buckets = await followed_buckets(settings, app[METADATA])
    return answer(
        Status(
            deployment=settings.deployment,
            buckets=[bucket for bucket in buckets if grant.holds_some_of(bucket)],
            images={state: sum(part.get(state, 0) for part in parts) for state in RowState},
            lag=freshness.lag,
            model=ModelStatus(
                name=model.name,
                fingerprint=model.fingerprint,
                dimension=model.dimension,
                backend=model.backend,
                precision=model.precision,
                collection=model.collection,
            ),
            freshness=freshness.status(),
            versions={
                "image-search": version("image-search"),
                "api": "1",
                "collection_schema": str(COLLECTION_SCHEMA_VERSION),
            },
        )
    )


async def live(_request: web.Request) -> web.Response:
    return answer(Liveness())


async def ready(request: web.Request) -> web.Response:
    components = await readiness(request.app[CHECKS])
    all_well = all(state == "ok" for state in components.values())
    return answer(Readiness(ready=all_well, components=components), 200 if all_well else 503)


async def metrics(_request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def openapi(request: web.Request) -> web.Response:
    return web.Response(body=request.app[OPENAPI], content_type=JSON, charset="utf-8")


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/status",
        status,
        "Counts by state, lag, model, freshness, versions",
        Status,
        scope=Scope.READ,
        errors=(ErrorCode.STORE_UNAVAILABLE,),
    ),
    Endpoint("GET", "/healthz/live", live, "The process runs", Liveness, scope=Open.HEALTH),
    Endpoint("GET", "/healthz/ready", ready, "By component; 503 while one is not well", Readiness, scope=Open.HEALTH),
    Endpoint("GET", "/metrics", metrics, "Prometheus metrics", "text/plain", scope=Open.METRICS),
    Endpoint("GET", "/openapi.json", openapi, "This document", JSON, scope=Open.DOCUMENT),
)
