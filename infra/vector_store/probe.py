"""Does a Milvus server let us in, and does it answer for what is loaded? The services ask for their own collection only."""

from __future__ import annotations

from functools import partial
from typing import Any

from pymilvus import AsyncMilvusClient, DataType  # type: ignore[import-untyped]  # it has no types
from pymilvus.client.types import LoadState  # type: ignore[import-untyped]  # it has no types

from infra.vector_store.address import Address
from infra.vector_store.calls import Connection


async def probe(address: Address, token: str, *, timeout_seconds: float) -> None:
    """Returns when each loaded collection answers a real query. Raises StoreUnavailable (NoWayIn while it lets nobody in)."""
    connection = Connection(address, token, timeout_seconds=timeout_seconds)
    try:
        for name in await connection.call(lambda client, seconds: client.list_collections(timeout=seconds)):
            await connection.call(partial(_require_searchable, name))
    finally:
        await connection.close()


async def _require_searchable(name: str, client: AsyncMilvusClient, seconds: float) -> None:
    state = await client.get_load_state(name, timeout=seconds)
    if state["state"] == LoadState.NotLoad:
        # Nobody asked for it to be loaded. While one is being loaded its state lags behind: the query tells.
        return
    description: dict[str, Any] = await client.describe_collection(name, timeout=seconds)
    key = next(field for field in description["fields"] if field.get("is_primary"))
    # No row is asked for; what counts is that the query node has caught up with its log and answers at all.
    nothing = '""' if key["type"] == DataType.VARCHAR else "0"
    await client.query(name, filter=f"{key['name']} == {nothing}", limit=1, output_fields=[key["name"]], timeout=seconds)
