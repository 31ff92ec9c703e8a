"""Does a database server let us in? The services ask more (`check`: the schema, too); what sets up a server asks this."""

from __future__ import annotations

from sqlalchemy import literal, select

from infra.metadata_store.engine import Database, parse_url


async def probe(url: str, *, timeout_seconds: float) -> None:
    """Returns when the server lets the user of this URL in. Raises StoreUnavailable and ConfigurationError."""
    database = Database(parse_url(url), pool_size=1, timeout_seconds=timeout_seconds)
    try:
        await database.read(lambda connection: connection.execute(select(literal(1))))
    finally:
        await database.close()
