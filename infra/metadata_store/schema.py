"""Bringing a database to the schema of this version, and refusing to work on any other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from infra.errors import ConfigurationError
from infra.metadata_store.engine import STORE, UPGRADE_HINT, Database, parse_url, set_sqlite_pragmas, sqlite_path, translated
from infra.metadata_store.tls import split_tls
from infra.metrics import store_error
from infra.settings import CommonSettings

_MIGRATIONS = Path(__file__).parents[1] / "migrations"
_LOCK_NAME = "image-search-upgrade"
_LOCK_SECONDS = 60


async def upgrade_schema(settings: CommonSettings) -> str:
    """Run the migrations that this database lacks; returns what was done, for people.

    Several at once are well: one works, the others wait for it and find nothing left to do.
    Raises StoreUnavailable and ConfigurationError.
    """
    url = parse_url(settings.database_url.get_secret_value())
    return await asyncio.to_thread(_upgrade, url)


async def check_version(database: Database) -> None:
    """Raises ConfigurationError unless the database has exactly the schema of this version."""
    needed = await asyncio.to_thread(head_version)
    found = await database.read(lambda connection: connection.run_sync(_version))
    if found != needed:
        raise ConfigurationError(
            f"the database's schema has {f'version {found}' if found else 'no version'}, this program needs {needed}; "
            f"{UPGRADE_HINT}"
        )


@cache
def head_version() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "there is at least one migration"
    return head


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(url: URL) -> str:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # the caller says what was done, in one line
    engine = _engine(url)
    try:
        with engine.connect() as connection, _alone(connection):
            before = _version(connection)
            if before == head_version():
                return f"schema is at version {before} already"
            command.upgrade(_config(connection), "head")
            return f"schema upgraded from version {before or 'none'} to {head_version()}"
    except SQLAlchemyError as error:
        raise translated(error) from error
    finally:
        engine.dispose()


def _engine(url: URL) -> Engine:
    """A plain engine, for the thread that the migrations run in: Alembic does not await."""
    path = sqlite_path(url)
    if path is None:
        plain, context = split_tls(url.set(drivername="mysql+pymysql"))
        return sqlalchemy.create_engine(plain, connect_args={"connect_timeout": _LOCK_SECONDS, "ssl": context})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make the database's folder {path.parent}: {error.strerror}") from error
    engine = sqlalchemy.create_engine(url.set(drivername="sqlite"))

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlalchemy.engine.interfaces.DBAPIConnection, _record: object) -> None:
        set_sqlite_pragmas(connection, busy_seconds=_LOCK_SECONDS)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


@contextlib.contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Hold off other upgrades of this database: two at once would both create the same tables.

    On SQLite the transaction itself is the lock, and a failed upgrade leaves nothing behind. A server commits at every
    change of a table, so there it is a lock by name, which goes away with the connection.
    """
    if connection.dialect.name == "sqlite":
        with connection.begin():
            yield
        return
    if not connection.scalar(select(func.get_lock(_LOCK_NAME, _LOCK_SECONDS))):
        raise store_error(STORE, f"another upgrade has been running for {_LOCK_SECONDS} s")
    yield
    connection.commit()
