"""Promise: a database server that is restarted, kills connections or ends transactions costs waiting and nothing else. MariaDB.

The fault bites: the server's list of connections shows each query that is cancelled or killed while it waits there, and its
own counter shows the deadlock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, make_url, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from infra.metadata_store.interface import MetadataStore
from infra.settings import CommonSettings, ProcessorSettings
from schemas.events import Cause, ObjectEvent
from schemas.identity import ObjectId, ObjectRef
from schemas.tables import images
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, WorkerProcess, deployed, until
from tests.failpoints import Gate, hold_after
from tests.numbered import Numbered

OBJECTS = 40
POOL = 2
ROUNDS = 5
KILLS = 3
QUESTIONS = 20
EMBEDDED = 7
ONE_BATCH = {"decode_workers": 1, "batch_size": OBJECTS, "batches_in_flight": 1}
LOCKED_ROW = 1205


class Administrator:
    """The database server as its administrator sees it: every question by a connection of its own, on a thread."""

    def __init__(self, settings: CommonSettings) -> None:
        url = make_url(settings.database_url.get_secret_value()).set(drivername="mysql+pymysql")
        self._database = url.database
        self._engine = create_engine(url, poolclass=NullPool, isolation_level="READ COMMITTED")

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            yield connection

    async def waiting(self) -> set[int]:
        """Connections whose query waits for a table."""
        query = "SELECT id FROM information_schema.processlist WHERE db = :db AND state LIKE 'Waiting for table%'"
        return {row.id for row in await self._ask(query, db=self._database)}

    async def kill(self, connection_id: int) -> None:
        await self._ask(f"KILL {connection_id}")

    async def deadlocks(self) -> int:
        [row] = await self._ask("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")
        return int(row[1])

    async def is_locked(self, object_id: ObjectId) -> bool:
        query = select(images.c.generation).where(images.c.object_id == object_id).with_for_update(nowait=True)

        def ask() -> bool:
            with self.connection() as connection:
                try:
                    connection.execute(query)
                except OperationalError as error:
                    assert error.orig is not None
                    if error.orig.args[0] == LOCKED_ROW:
                        return True
                    raise
            return False

        return await asyncio.to_thread(ask)

    @asynccontextmanager
    async def locked_tables(self) -> AsyncIterator[None]:
        """Every query waits for the length of the block."""
        with self.connection() as connection:
            await asyncio.to_thread(connection.exec_driver_sql, "LOCK TABLES images WRITE")
            try:
                yield
            finally:
                await asyncio.to_thread(connection.exec_driver_sql, "UNLOCK TABLES")

    async def _ask(self, query: str, **values: object) -> list[Any]:
        def ask() -> list[Any]:
            with self.connection() as connection:
                result = connection.execute(text(query), values)
                return list(result) if result.returns_rows else []

        return await asyncio.to_thread(ask)


async def test_killed_connections_cancelled_queries_and_a_restart_with_a_pool_of_two(
    full_servers: Servers, full_settings: FreshSettings, tmp_path: Path
) -> None:
    settings = full_settings(ProcessorSettings, database_pool_size=POOL, decode_workers=1, batch_size=8)
    administrator = Administrator(settings)
    async with deployed(settings, tmp_path) as deployment:
        worker = deployment.worker()
        objects = Numbered(deployment, OBJECTS)
        await deployment.send(await objects.put())
        await deployment.settle()
        changes = await objects.change()

        async with administrator.locked_tables():
            for _ in range(ROUNDS):
                await _cancel_queries(deployment.metadata, administrator)
            await deployment.send(changes)
            await _kill_connections(administrator)
        await until(lambda: _waited_for_the_database(worker, KILLS))
        waited = await _waits_for_the_database(worker)
        async with full_servers.stack.paused("mariadb"):
            more = Numbered(deployment, OBJECTS, folder="more", first_seed=1000)
            await deployment.send(await more.put())
            await until(lambda: _waited_for_the_database(worker, waited + 1))
            assert await deployment.lag() >= OBJECTS
        # The pool still has both connections to give, and the answers are right.
        ids = [ObjectRef(deployment.bucket, key).object_id for key in objects.keys]
        answers = await asyncio.gather(*(deployment.metadata.rows(ids) for _ in range(QUESTIONS)))
        assert [answer.keys() for answer in answers] == [set(ids)] * QUESTIONS
        await deployment.settle()
        assert await worker.stop() == 0
        await objects.assert_as_the_bucket_says()
        await more.assert_as_the_bucket_says()


async def _cancel_queries(metadata: MetadataStore, administrator: Administrator) -> None:
    """As many as there are connections while the server works on them, and as many that wait for a connection."""
    before = await administrator.waiting()
    queries = [asyncio.create_task(metadata.counts()) for _ in range(2 * POOL)]
    async with asyncio.timeout(60):
        while len(await administrator.waiting() - before) < POOL:
            await asyncio.sleep(0.02)
    for query in queries:
        query.cancel()
    ended = await asyncio.gather(*queries, return_exceptions=True)
    assert [type(end) for end in ended] == [asyncio.CancelledError] * len(queries)


async def _kill_connections(administrator: Administrator) -> None:
    """Each while the worker's query waits in the server; the worker comes again with another."""
    cancelled = await administrator.waiting()  # the server has not noticed yet that nobody wants their answers
    killed: set[int] = set()
    async with asyncio.timeout(60):
        while len(killed) < KILLS:
            for connection in await administrator.waiting() - cancelled - killed:
                await administrator.kill(connection)
                killed.add(connection)
            await asyncio.sleep(0.02)


async def _waits_for_the_database(worker: WorkerProcess) -> int:
    return int(await worker.metric("image_search_retries_total", store="metadata store"))


async def _waited_for_the_database(worker: WorkerProcess, times: int) -> bool:
    return await _waits_for_the_database(worker) >= times


async def test_the_victim_of_a_deadlock_is_done_again_whole(full_settings: FreshSettings, tmp_path: Path) -> None:
    settings = full_settings(ProcessorSettings, database_timeout_seconds=60, **ONE_BATCH)
    administrator = Administrator(settings)
    async with deployed(settings, tmp_path) as deployment:
        gate = Gate(tmp_path / "gate")
        worker = deployment.worker(hold_after(EMBEDDED, gate))
        objects = Numbered(deployment, OBJECTS)
        await deployment.send(await objects.put())
        await deployment.settle()
        before = await deployment.rows()
        deadlocks = await administrator.deadlocks()

        await deployment.send_as_one_batch(await _events_for_all(deployment, objects), worker, gate)
        backwards = sorted((before[key].object_id for key in objects.keys), reverse=True)
        with administrator.connection() as other:
            await _touch(other, backwards[: OBJECTS // 2])
            gate.open()
            await until(lambda: administrator.is_locked(backwards[-1]))
            # The worker has rows from below and waits for one above. The other has written more, so the worker is the victim.
            # The lowest first: there the worker waits when it begins again, and is not a victim once more.
            await _touch(other, [backwards[-1], *backwards[OBJECTS // 2 : -1]])
            assert await administrator.deadlocks() == deadlocks + 1
            await asyncio.to_thread(other.commit)
        await deployment.settle()
        assert await _waits_for_the_database(worker) == 0  # it was done again at once: nothing was unavailable
        rows = await deployment.rows()
        for key in objects.keys:
            assert rows[key].created_at_us == before[key].created_at_us + 1
            assert rows[key].generation == before[key].generation + 1
        assert await worker.stop() == 0
        await objects.assert_as_the_bucket_says()


async def _events_for_all(deployment: Deployment, objects: Numbered) -> list[ObjectEvent]:
    """What changed, and a repair of all that did not: a batch that writes every row."""
    changes = await objects.change()
    changed = {event.data.key for event in changes}
    return [*changes, *(deployment.event(key, cause=Cause.REPAIR) for key in objects.keys if key not in changed)]


async def _touch(connection: Connection, ids: Sequence[ObjectId]) -> None:
    """One row after the other, in a column that no worker writes again."""
    for object_id in ids:
        touched = update(images).where(images.c.object_id == object_id).values(created_at_us=images.c.created_at_us + 1)
        await asyncio.to_thread(connection.execute, touched)


async def test_two_writers_of_the_same_rows_in_reversed_order(full_settings: FreshSettings, tmp_path: Path) -> None:
    """Two workers of two groups, because the events of one group are never shared: what a rebalance makes by bad luck."""
    settings = full_settings(ProcessorSettings, **ONE_BATCH)
    other_settings = settings.model_copy(update={"kafka_topic_prefix": f"{settings.kafka_topic_prefix}other."})
    administrator = Administrator(settings)
    async with deployed(settings, tmp_path / "one") as one, deployed(other_settings, tmp_path / "other") as other:
        objects = Numbered(one, OBJECTS)
        sent = await objects.put()
        gates = [Gate(tmp_path / "one" / "gate"), Gate(tmp_path / "other" / "gate")]
        workers = [deployment.worker(hold_after(EMBEDDED, gate)) for deployment, gate in zip((one, other), gates, strict=True)]
        deadlocks = await administrator.deadlocks()
        await one.send_as_one_batch(sent, workers[0], gates[0])
        await other.send_as_one_batch(sent[::-1], workers[1], gates[1])
        for gate in gates:
            gate.open()
        await asyncio.gather(one.settle(), other.settle())
        assert sum([await worker.metric("image_search_generation_conflicts_total") for worker in workers]) == OBJECTS
        assert await administrator.deadlocks() == deadlocks  # rows are locked in the order of their ids, whoever comes first
        await objects.assert_as_the_bucket_says()

        changes = await objects.change()
        await asyncio.gather(one.send(changes), other.send(changes[::-1]))
        await asyncio.gather(one.settle(), other.settle())
        assert [await worker.stop() for worker in workers] == [0, 0]
        await objects.assert_as_the_bucket_says()
