"""Accounts of a Milvus server. The services never need this; what sets up a server does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pymilvus import AsyncMilvusClient  # type: ignore[import-untyped]  # it has no types

from infra.vector_store.address import Address
from infra.vector_store.calls import Connection

ALL_COLLECTIONS = "*"


async def change_password(address: Address, user: str, old: str, new: str, *, timeout_seconds: float) -> None:
    """Raises StoreUnavailable when the server does not answer yet or does not know the old password."""

    async def change(client: AsyncMilvusClient, seconds: float) -> None:
        await client.update_password(user, old, new, timeout=seconds)

    connection = Connection(address, f"{user}:{old}", timeout_seconds=timeout_seconds)
    try:
        await connection.call(change)
    finally:
        await connection.close()


async def add_account(
    address: Address,
    token: str,
    *,
    user: str,
    password: str,
    privileges: Mapping[str, Sequence[str]],
    timeout_seconds: float,
) -> None:
    """A user, and a role of the same name with these privileges, by the kind of thing that they are for.

    Repeated, it adds what is missing. `token` is an administrator's. Raises StoreUnavailable.
    """

    async def add(client: AsyncMilvusClient, seconds: float) -> None:
        if user not in await client.list_users(timeout=seconds):
            await client.create_user(user, password, timeout=seconds)
        if user not in await client.list_roles(timeout=seconds):
            await client.create_role(user, timeout=seconds)
        for kind, names in privileges.items():
            for name in names:
                await client.grant_privilege(user, kind, name, ALL_COLLECTIONS, timeout=seconds)
        await client.grant_role(user, user, timeout=seconds)

    connection = Connection(address, token, timeout_seconds=timeout_seconds)
    try:
        await connection.call(add)
    finally:
        await connection.close()
