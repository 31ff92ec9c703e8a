"""What Alembic runs for every command: how a migration meets the database.

`image-search upgrade` hands over a connection (infra/metadata_store/schema.py). For a new migration, `alembic revision
--autogenerate -m "..."` at the root of the repository compares schemas/tables.py with the database of the settings.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, create_engine

from infra.metadata_store.engine import parse_url
from infra.settings import CommonSettings, load
from schemas.tables import metadata


def _run_on(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        # SQLite cannot alter most things: Alembic then makes the table anew and copies it.
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


def _run_for_developer() -> None:
    url = parse_url(load(CommonSettings).database_url.get_secret_value())
    driver = "sqlite" if url.get_backend_name() == "sqlite" else "mysql+pymysql"
    engine = create_engine(url.set(drivername=driver))
    with engine.connect() as connection:
        _run_on(connection)
    engine.dispose()


_handed_over = context.config.attributes.get("connection")
if _handed_over is not None:
    _run_on(_handed_over)
else:
    _run_for_developer()
