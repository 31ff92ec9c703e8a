"""What the SQL store promises beside the contract: its schema, its patience with other processes, its errors."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from infra import metadata_store
from infra.errors import ConfigurationError, StoreUnavailable
from infra.metadata_store import MetadataStore, upgrade_schema
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.settings import CommonSettings
from schemas.identity import ObjectRef
from schemas.tables import RowState, metadata

REF = ObjectRef("images", "picture.jpg")


def settings_of(file: Path, **changes: object) -> CommonSettings:
    return CommonSettings.model_validate({"database_url": f"sqlite+aiosqlite:///{file}", **changes})


def write_of(generation: int = 1) -> RowWrite:
    return RowWrite(ImageRow(REF, RowState.IGNORED, generation, published_generation=0), generation - 1)


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a folder # with 100% odd names" / "metadata.db"


@pytest.fixture
async def store(file: Path) -> AsyncIterator[MetadataStore]:
    settings = settings_of(file, database_timeout_seconds=1)
    await upgrade_schema(settings)
    store = await metadata_store.connect(settings)
    yield store
    await store.close()


async def test_the_migrations_make_exactly_the_tables(file: Path) -> None:
    await upgrade_schema(settings_of(file))
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


async def test_an_upgrade_says_what_it_did(file: Path) -> None:
    assert await upgrade_schema(settings_of(file)) == "schema upgraded from version none to 0004"
    assert await upgrade_schema(settings_of(file)) == "schema is at version 0004 already"


async def test_upgrades_at_once_wait_for_each_other(file: Path) -> None:
    said = await asyncio.gather(*(upgrade_schema(settings_of(file)) for _ in range(4)))
    assert sorted(said) == ["schema is at version 0004 already"] * 3 + ["schema upgraded from version none to 0004"]


async def test_a_store_without_a_schema_names_the_command_and_leaves_no_file(file: Path) -> None:
    file.parent.mkdir()
    store = await metadata_store.connect(settings_of(file))
    for question in (store.check(), store.rows([REF.object_id]), store.write([write_of()])):
        with pytest.raises(ConfigurationError, match="run: image-search upgrade"):
            await question
    await store.close()
    assert files_in(file.parent) == []


@pytest.mark.parametrize("version", ["0000", None])
async def test_a_schema_of_another_version_is_refused(store: MetadataStore, file: Path, version: str | None) -> None:
    await store.check()
    with closing(sqlite3.connect(file)) as other, other:
        other.execute("DELETE FROM alembic_version")
        if version:
            other.execute("INSERT INTO alembic_version VALUES (?)", (version,))
    with pytest.raises(ConfigurationError, match="run: image-search upgrade"):
        await store.check()


async def test_a_locked_database_is_waited_for(store: MetadataStore, file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(store.write([write_of()]))
        # Readers do not wait for a writer.
        assert await store.rows([REF.object_id]) == {}
        assert not writing.done()
        other.execute("COMMIT")
        assert await writing == set()


async def test_a_database_locked_for_too_long_is_unavailable_and_comes_back(store: MetadataStore, file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="no answer in 1 s"):
            await store.write([write_of()])
        other.execute("ROLLBACK")
    assert await store.write([write_of()]) == set()


async def test_a_cancelled_write_leaves_nothing_and_no_lock(store: MetadataStore, file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(store.write([write_of()]))
        await store.rows([REF.object_id])
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        other.execute("ROLLBACK")
    assert await store.rows([REF.object_id]) == {}
    assert await store.write([write_of()]) == set()


RAISE_GENERATIONS = """
import asyncio, sys
from dataclasses import replace
from infra import metadata_store
from infra.metadata_store.interface import RowWrite
from infra.settings import CommonSettings
from schemas.identity import ObjectRef

async def main(url):
    store = await metadata_store.connect(CommonSettings(database_url=url))
    refs = [ObjectRef("images", f"key-{number}") for number in range(8)]
    won = 0
    while won < 100:
        rows = await store.rows([ref.object_id for ref in refs])
        writes = [RowWrite(replace(row, generation=row.generation + 1), row.generation) for row in rows.values()]
        won += len(writes) - len(await store.write(writes))
    await store.close()
    print(won)

asyncio.run(main(sys.argv[1]))
"""


async def test_processes_that_write_the_same_rows_share_out_the_generations(store: MetadataStore, file: Path) -> None:
    refs = [ObjectRef("images", f"key-{number}") for number in range(8)]
    await store.write([RowWrite(ImageRow(ref, RowState.IGNORED, 1, published_generation=0), 0) for ref in refs])
    url = f"sqlite+aiosqlite:///{file}"
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", RAISE_GENERATIONS, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]
    said = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0, 0, 0], said
    wins = sum(int(output) for output, _errors in said)
    rows = await store.rows([ref.object_id for ref in refs])
    assert sum(row.generation - 1 for row in rows.values()) == wins


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://u:s3cret@127.0.0.1/d",
        "sqlite+aiosqlite://",
        "sqlite+aiosqlite:///:memory:",
        "mysql+aiomysql://u:s3cret@127.0.0.1",
        "u:s3cret@nonsense",
    ],
)
async def test_a_url_that_cannot_work_is_refused_without_its_password(url: str) -> None:
    settings = CommonSettings.model_validate({"database_url": url})
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_DATABASE_URL") as refused:
        await metadata_store.connect(settings)
    with pytest.raises(ConfigurationError):
        await upgrade_schema(settings)
    assert "s3cret" not in str(refused.value)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    settings = CommonSettings.model_validate({"database_url": "mysql+aiomysql://user:s3cret@127.0.0.1:1/metadata"})
    store = await metadata_store.connect(settings)
    for call in (store.check(), upgrade_schema(settings)):
        with pytest.raises(StoreUnavailable) as refused:
            await call
        assert "s3cret" not in str(refused.value)
    await store.close()
