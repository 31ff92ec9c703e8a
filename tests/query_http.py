"""The query service over HTTP on loopback, its stores being the twins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request

from infra.settings import QuerySettings
from query_service.app import init_app
from query_service.endpoint import Endpoint
from schemas.api import ErrorCode
from tests.query_world import QueryWorld, Server

MAX_BYTES = 100_000

Client = TestClient[Request, Application]


def settings(**changes: object) -> QuerySettings:
    defaults = {
        "api_keys": "off",
        "max_object_bytes": MAX_BYTES,
        "max_limit": 500,
        "event_heartbeat_seconds": 0.05,
        "wait_timeout_seconds": 0.2,
        "body_timeout_seconds": 5,
    }
    return QuerySettings.model_validate({**defaults, **changes})


@asynccontextmanager
async def running(world: QueryWorld, **changes: object) -> AsyncIterator[Client]:
    async with TestClient(Server(init_app(settings(**changes), world.resources()))) as client:
        yield client


async def refused(response: aiohttp.ClientResponse, code: ErrorCode) -> dict[str, Any]:
    """The error of an answer, after checking that it has the one shape, the code's status, and the request's id."""
    body = await response.json()
    assert body.keys() == {"error"}, body
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"code", "message", "details", "request_id"}
    assert (error["code"], response.status) == (code, code.status)
    assert error["request_id"] == response.headers["X-Request-Id"]
    assert error["message"].endswith(".")
    assert "hex()" not in error["message"]
    return error


def keys_of(answer: dict[str, Any]) -> list[str]:
    return [hit["key"] for hit in answer["hits"]]


def path_of(endpoint: Endpoint) -> str:
    """A path of this route at which nothing is."""
    return endpoint.path.replace("{id}", "0" * 64).replace("{job_id}", "0" * 36).replace("{bucket}/{key}", "images/a.jpg") + (
        "?follow=false" if endpoint.path == "/v1/events" else ""
    )
