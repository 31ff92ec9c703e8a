"""Who may do what at a broker. The services never need this; what sets up a server does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka.admin import AIOKafkaAdminClient  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import for_code  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.protocol.admin import CreateAclsRequest  # type: ignore[import-untyped]  # aiokafka ships no types

from infra.kafka.connection import STORE_NAME, Connection
from infra.metrics import store_error

# Numbers of Kafka's protocol.
_RESOURCES = {"topic": 2, "group": 3}
_OPERATIONS = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8}
_LITERAL = 3
_ALLOW = 3


@dataclass(frozen=True, slots=True)
class Grant:
    """`resource` is topic or group; `name` is whole, with its prefix. Read and Write hold Describe."""

    resource: str
    name: str
    operation: str


async def allow(connection: Connection, user: str, grants: Sequence[Grant]) -> None:
    """Repeated, it changes nothing. Raises StoreUnavailable."""
    admin = AIOKafkaAdminClient(**connection.options)
    try:
        async with connection.bounded():
            await admin.start()
            for grant in grants:
                await _allow(admin, f"User:{user}", grant)
    finally:
        await connection.ended(admin.close())


async def _allow(admin: AIOKafkaAdminClient, principal: str, grant: Grant) -> None:
    # The library's admin client has no method for it, only the request.
    client = admin._client
    request = CreateAclsRequest(
        _RESOURCES[grant.resource], grant.name, _LITERAL, principal, "*", _OPERATIONS[grant.operation], _ALLOW
    )
    answer = await client.send(client.get_random_node(), request)
    for code, _ in answer.creation_responses:
        if code:
            raise store_error(STORE_NAME, f"it refused to let {principal} in ({for_code(code).__name__})")
