"""One fresh world a test, and the service on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.query_http import Client, running
from tests.query_world import QueryWorld


@pytest.fixture
async def world() -> QueryWorld:
    return await QueryWorld().start()


@pytest.fixture
async def client(world: QueryWorld) -> AsyncIterator[Client]:
    async with running(world) as client:
        yield client
