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
from tests.bridge import relaying, scan
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed, until
from tests.numbered import PICTURE_SIZE, Numbered
from tests.own_minio import own_minio
from tests.pictures import jpeg
from tests.small_disk import small_disk

OBJECTS = 60
DATABASE_MIB = 16
MINIO_MIB = 64


async def test_no_room_for_the_database(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DATABASE_MIB) as disk:
        database = disk.root / "metadata.db"
        settings = fresh_settings(ProcessorSettings, database_url=f"sqlite+aiosqlite:///{database}", decode_workers=1)
        async with deployed(settings, tmp_path) as deployment:
            worker = deployment.worker()
            old, new = Numbered(deployment, OBJECTS), Numbered(deployment, OBJECTS, folder="new", first_seed=1000)
            await deployment.send(await old.put())
            await deployment.settle()

            _give_back_what_its_log_holds(database)
            disk.fill()
            sent = await old.change() + await new.put()
            await deployment.send(sent)
            await until(lambda: worker.says("the disk is full"))
            assert disk.is_full
            assert await deployment.lag() == len(sent)  # nothing was acknowledged
            assert len(await deployment.rows()) == OBJECTS

            disk.make_room()
            await deployment.settle()
            assert worker.process.poll() is None
            await old.assert_as_the_bucket_says()
            await new.assert_as_the_bucket_says()


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
                old, new = Numbered(deployment, OBJECTS), Numbered(deployment, OBJECTS, folder="new", first_seed=1000)
                await old.put()
                await until(lambda: _are_rows(deployment, OBJECTS))

                disk.fill()
                for name in new.keys:
                    with pytest.raises(StoreUnavailable, match="507"):
                        await deployment.put(name, jpeg(1, PICTURE_SIZE))
                assert disk.is_full
                await old.assert_as_the_bucket_says()  # what was acknowledged before is whole

                disk.make_room()
                await until(lambda: _takes_objects(deployment))
                await old.change()
                await new.put()
                await scan(deployment)
                await old.assert_as_the_bucket_says()
                await new.assert_as_the_bucket_says()


async def _are_rows(deployment: Deployment, number: int) -> bool:
    return len(await deployment.rows()) == number


async def _takes_objects(deployment: Deployment) -> bool:
    """MinIO looks only now and then how much room there is."""
    try:
        await deployment.put("probe.jpg", jpeg(1, PICTURE_SIZE))
    except StoreUnavailable:
        return False
    return True
