"""Accounts of a Milvus server. The services never need this; what sets up a server does."""

from __future__ import annotations

from pymilvus import AsyncMilvusClient, MilvusException  # type: ignore[import-untyped]  # it has no types

from infra.metrics import store_error


async def change_password(uri: str, user: str, old: str, new: str, *, timeout_seconds: float) -> None:
    """Raises StoreUnavailable when the server does not answer yet or does not know the old password."""
    try:
        client = AsyncMilvusClient(uri, user=user, password=old, timeout=timeout_seconds)
        try:
            await client.update_password(user, old, new, timeout=timeout_seconds)
        finally:
            await client.close()
    except MilvusException as error:
        raise store_error("vector store", f"the password of {user} could not be changed: code {error.code}") from None
