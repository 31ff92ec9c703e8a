"""The query service on a deployment of real servers, with a worker that indexes what is put."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request

from infra.settings import ProcessorSettings, QuerySettings
from query_service.app import init_app
from schemas.identity import ObjectRef
from tests.deployment import Deployment, deployed
from tests.query_world import Server

Client = TestClient[Request, Application]


def query_settings(settings: ProcessorSettings, **changes: object) -> QuerySettings:
    """The same deployment, as the query service is told of it."""
    return QuerySettings.model_validate({**settings.model_dump(), "api_keys": "off", "event_heartbeat_seconds": 1.0, **changes})


class Service:
    def __init__(self, deployment: Deployment, client: Client) -> None:
        self.deployment, self.client = deployment, client

    @property
    def url(self) -> str:
        return str(self.client.make_url("/"))

    def id_of(self, key: str) -> str:
        return ObjectRef(self.deployment.bucket, key).object_id.hex()

    async def put(self, key: str, data: bytes) -> str:
        """Put an object and announce it. Returns the token to wait for it."""
        event = await self.deployment.put(key, data)
        await self.deployment.send([event])
        return f"{self.id_of(key)}:{event.data.etag}"

    async def delete(self, key: str) -> str:
        await self.deployment.send([await self.deployment.remove(key)])
        return f"{self.id_of(key)}:deleted"

    async def search(self, picture: bytes, **parameters: str) -> dict[str, Any]:
        response = await self.client.post("/v1/search", data=picture, params=parameters)
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


@asynccontextmanager
async def serving(settings: ProcessorSettings, folder: Path) -> AsyncIterator[Service]:
    async with deployed(settings, folder) as deployment:
        worker = deployment.worker()
        async with TestClient(Server(init_app(query_settings(deployment.settings)))) as client:
            yield Service(deployment, client)
        await worker.stop()
