"""Connections, transactions, their time-out and their retries: what SQLite, MySQL and MariaDB each need to behave alike."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from infra.errors import ConfigurationError, StoreUnavailable
from infra.metadata_store.tls import refuse_unencrypted, split_tls
from infra.metrics import store_error

Result = TypeVar("Result")
Work = Callable[[AsyncConnection], Awaitable[Result]]

STORE = "metadata store"
UPGRADE_HINT = "run: image-search upgrade"

MOST_ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.01
SQLITE_BUSY_SECONDS = 5.0
# Below the server's wait_timeout and below what proxies in between keep an idle connection for.
RECYCLE_SECONDS = 1800

_WRITES = "image_search_writes"
_ONE_QUERY = "image_search_one_query"

# Lock wait time-out, deadlock, and a key that another writer inserted after we had looked for it. Done again from the
# start, the first two get their locks and the third sees the other's row.
_MYSQL_LOST_A_RACE = frozenset({1062, 1205, 1213})
_MYSQL_NO_SCHEMA = frozenset({1049, 1054, 1146})  # unknown database, column, table
_MYSQL_NO_ROOM = frozenset({1021, 1114})  # disk full, table full
_SQLITE_LOST_A_RACE = "database is locked"
_SQLITE_NO_ROOM = "database or disk is full"
_SQLITE_NO_SCHEMA = ("no such table", "no such column", "unable to open database file")


def now_us() -> int:
    """Microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1000


def parse_url(text: str) -> URL:
    """Raises ConfigurationError without the password in it."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigurationError(
            "IMAGE_SEARCH_DATABASE_URL: not a database URL; write sqlite+aiosqlite:///PATH or "
            "mysql+aiomysql://user:password@host:port/name"
        ) from None
    if url.drivername not in ("sqlite+aiosqlite", "mysql+aiomysql", "mariadb+aiomysql"):
        raise ConfigurationError(
            f"IMAGE_SEARCH_DATABASE_URL: {url.drivername} is not supported; use sqlite+aiosqlite or mysql+aiomysql"
        )
    if not url.database or url.database == ":memory:":
        raise ConfigurationError("IMAGE_SEARCH_DATABASE_URL: names no database that several processes can share")
    return url


def sqlite_path(url: URL) -> Path | None:
    """The file of a SQLite database; None for a server."""
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def set_sqlite_pragmas(connection: DBAPIConnection, *, busy_seconds: float) -> None:
    """For every new connection. Takes transaction control from the driver, which would begin too late and never IMMEDIATE."""
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(busy_seconds * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    # Offsets are acknowledged after the commit: a commit that a power cut takes back would be a loss until the next scan,
    # and a generation given out twice.
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A read transaction that turns into a writing one fails at once, whatever the busy time-out, when another process
    # wrote in between. So a writing one takes its place in the queue when it begins.
    options = connection.get_execution_options()
    if options.get(_ONE_QUERY, False):
        # A query by itself sees one state anyway, and each call of the driver wakes its thread and ours.
        return
    writes = options.get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _sqlite_engine(url: URL, path: Path, pool_size: int, timeout: float) -> AsyncEngine:
    # mode=rw: a service that starts before `upgrade` must not leave an empty file behind.
    existing = url.set(database=f"file:{quote(str(path.absolute()))}", query={"mode": "rw", "uri": "true"})
    engine = create_async_engine(existing, pool_size=pool_size, max_overflow=0)

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: DBAPIConnection, _record: object) -> None:
        # SQLite waits in its own thread and cannot be called back: it must not wait longer than we do.
        set_sqlite_pragmas(connection, busy_seconds=min(SQLITE_BUSY_SECONDS, timeout / 2))

    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _server_engine(url: URL, pool_size: int, timeout: float) -> AsyncEngine:
    plain, context = split_tls(url)
    engine = create_async_engine(
        plain,
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=True,
        pool_recycle=RECYCLE_SECONDS,
        pool_timeout=timeout,
        # Fewer gap locks, so fewer deadlocks; and a transaction that waited for a row sees what it waited for.
        isolation_level="READ COMMITTED",
        connect_args={"connect_timeout": timeout, "ssl": context},
    )
    if context is not None:
        refuse_unencrypted(engine.sync_engine)
    return engine


class Database:
    """Runs units of work in transactions of their own. Belongs to the event loop that first uses it."""

    def __init__(self, url: URL, *, pool_size: int, timeout_seconds: float) -> None:
        path = sqlite_path(url)
        self._engine = (
            _server_engine(url, pool_size, timeout_seconds)
            if path is None
            else _sqlite_engine(url, path, pool_size, timeout_seconds)
        )
        self._query = self._engine.execution_options(**{_ONE_QUERY: True})
        self._writer = self._engine.execution_options(**{_WRITES: True})
        self._serial = self._writer if path is not None else self._writer.execution_options(isolation_level="SERIALIZABLE")
        self._timeout = timeout_seconds
        # SQLite has one writer at a time, and its waiters poll: within a process they queue here instead.
        self._turn = asyncio.Lock() if path is not None else None

    async def read(self, work: Work[Result]) -> Result:
        """Run `work` in a transaction that only reads. Raises StoreUnavailable and ConfigurationError."""
        return await self._run(self._engine, work)

    async def query(self, work: Work[Result]) -> Result:
        """As `read`, for a single query on the way of every search: SQLite is spared the transaction around it."""
        return await self._run(self._query, work)

    async def write(self, work: Work[Result], *, serial: bool = False) -> Result:
        """Run `work` in a transaction, the whole of it again when it lost a race: `work` must start from nothing each time.

        `serial`: what `work` reads cannot change before it commits, rows that do not exist yet included.
        """
        engine = self._serial if serial else self._writer
        return await self._run(engine, work, self._turn)

    async def close(self) -> None:
        await self._engine.dispose()

    async def _run(self, engine: AsyncEngine, work: Work[Result], turn: asyncio.Lock | None = None) -> Result:
        try:
            async with asyncio.timeout(self._timeout), turn or contextlib.nullcontext():
                return await _attempts(engine, work)
        except TimeoutError:
            raise store_error(STORE, f"no answer in {self._timeout:g} s") from None
        except (SQLAlchemyError, OSError) as error:
            raise translated(error) from error


class SqlPart:
    """A part of the metadata store. The parts share one database and one clock."""

    def __init__(self, database: Database, now_us: Callable[[], int] = now_us) -> None:
        self._database = database
        self._now_us = now_us


async def _attempts(engine: AsyncEngine, work: Work[Result]) -> Result:
    for attempt in range(1, MOST_ATTEMPTS):
        with contextlib.suppress(_LostARace):
            return await _attempt(engine, work)
        await asyncio.sleep(random.uniform(0, FIRST_WAIT_SECONDS * 2**attempt))  # noqa: S311 - jitter, not a secret
    try:
        return await _attempt(engine, work)
    except _LostARace as lost:
        raise store_error(STORE, f"{MOST_ATTEMPTS} attempts lost against other writers") from lost.__cause__


async def _attempt(engine: AsyncEngine, work: Work[Result]) -> Result:
    try:
        async with _transaction(engine) as connection:
            return await work(connection)
    except DBAPIError as error:
        if lost_a_race(error):
            raise _LostARace from error
        raise


@contextlib.asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        if engine.get_execution_options().get(_WRITES, False):
            async with connection.begin():
                yield connection
        else:
            # Begins by itself and is rolled back by its end: a commit would be one more trip to the database.
            yield connection


class _LostARace(Exception):
    """Another transaction was in the way; the same work will do next time."""


def lost_a_race(error: DBAPIError) -> bool:
    code, text = _code_and_text(error)
    return code in _MYSQL_LOST_A_RACE or _SQLITE_LOST_A_RACE in text


def translated(error: Exception) -> ConfigurationError | StoreUnavailable:
    code, text = _code_and_text(error)
    if code in _MYSQL_NO_SCHEMA or any(part in text for part in _SQLITE_NO_SCHEMA):
        return ConfigurationError(f"the database is missing or has not the schema of this version; {UPGRADE_HINT}")
    if code in _MYSQL_NO_ROOM or _SQLITE_NO_ROOM in text:
        return store_error(STORE, "the disk is full: make room where the database lies")
    return store_error(STORE, f"{type(getattr(error, 'orig', None) or error).__name__} {code or ''}".rstrip())


def _code_and_text(error: Exception) -> tuple[int | None, str]:
    original: Any = getattr(error, "orig", None) or error
    code = original.args[0] if original.args and isinstance(original.args[0], int) else None
    return code, str(original)
