"""Promise: a full disk fails loudly, nothing is acknowledged that was not written, and work goes on when there is room again.

The disks are small file systems in memory, filled to the last byte: under the SQLite database and the worker's own folder and
log, and under the objects of a MinIO.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from infra.errors import StoreUnavailable
from infra.settings import ProcessorSettings
from schemas.identity import ObjectRef
from schemas.tables import RowState
from tests.bridge import relaying, scan
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed, until
from tests.own_minio import own_minio
from tests.pictures import jpeg
from tests.small_disk import small_disk

OBJECTS = 60
DATABASE_MIB = 16
MINIO_MIB = 64


def key(number: int) -> str:
    return f"{number:03}.jpg"


def picture(seed: int) -> bytes:
    return jpeg(seed, (120, 90))


async def test_no_room_for_the_database(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DATABASE_MIB) as disk:
        database = disk.root / "metadata.db"
        settings = fresh_settings(ProcessorSettings, database_url=f"sqlite+aiosqlite:///{database}", decode_workers=1)
        async with deployed(settings, tmp_path) as deployment:
            worker = deployment.worker()
            await deployment.send([await deployment.put(key(number), picture(number)) for number in range(0, OBJECTS, 5)])
            await deployment.settle()

            _give_back_what_its_log_holds(database)
            disk.fill()
            events = [
                await (
                    deployment.remove(key(number)) if number % 10 == 5 else deployment.put(key(number), picture(1000 + number))
                )
                for number in range(OBJECTS)
            ]
            await deployment.send(events)
            await until(lambda: worker.says("the disk is full"))
            assert disk.is_full
            assert await deployment.lag() == OBJECTS  # nothing was acknowledged
            assert len(await deployment.rows()) == OBJECTS // 5

            disk.make_room()
            await deployment.settle()
            assert worker.process.poll() is None
            await _as_the_bucket_says(deployment)


def _give_back_what_its_log_holds(database: Path) -> None:
    """The write-ahead log is written over from its beginning: what it has already would be room for the next writes."""
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def test_no_room_for_the_objects(fresh_settings: FreshSettings, servers: Servers, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", MINIO_MIB) as disk:
        async with own_minio(servers, disk.root / "minio") as minio:
            settings = fresh_settings(ProcessorSettings, **minio.values, decode_workers=1)
            async with deployed(settings, tmp_path) as deployment, relaying(settings):
                deployment.worker()
                for number in range(0, OBJECTS, 5):
                    await deployment.put(key(number), picture(number))
                await until(lambda: _are_rows(deployment, OBJECTS // 5))

                disk.fill()
                for number in range(OBJECTS):
                    with pytest.raises(StoreUnavailable, match="507"):
                        await deployment.put(key(number), picture(1000 + number))
                assert disk.is_full
                kept = await deployment.objects.read(ObjectRef(deployment.bucket, key(0)), max_bytes=1 << 20)
                assert kept.data == picture(0)  # what was acknowledged before is whole

                disk.make_room()
                await until(lambda: _takes_objects(deployment))
                for number in range(OBJECTS):
                    if number % 10 == 5:
                        await deployment.remove(key(number))
                    else:
                        await deployment.put(key(number), picture(1000 + number))
                await scan(deployment)
                await _as_the_bucket_says(deployment)


async def _are_rows(deployment: Deployment, number: int) -> bool:
    return len(await deployment.rows()) == number


async def _takes_objects(deployment: Deployment) -> bool:
    """MinIO looks only now and then how much room there is."""
    try:
        await deployment.put(key(0), picture(1000))
    except StoreUnavailable:
        return False
    return True


async def _as_the_bucket_says(deployment: Deployment) -> None:
    await deployment.verified()
    states = {name: row.state for name, row in (await deployment.rows()).items()}
    deleted = {key(number) for number in range(5, OBJECTS, 10)}
    indexed = {key(number) for number in range(OBJECTS)} - deleted
    assert states == dict.fromkeys(deleted, RowState.DELETED) | dict.fromkeys(indexed, RowState.INDEXED)
