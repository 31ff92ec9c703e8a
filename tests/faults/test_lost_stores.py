"""Promise: whatever store is lost, all but the bucket, `image-search rebuild` makes the index equal to the bucket again.

The fault bites: the new store is empty, seen before the rebuild. Some objects came, changed and went while nobody looked.
Rows and vectors are had from each other: a lost database costs no embedding of what did not change. If both are lost, a backup
saves it, also to a database of another kind.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Literal

import pytest

from infra import vector_store
from infra.settings import ProcessorSettings
from infra.verify import verify
from schemas.tables import ModelState, RowState
from tests.bridge import scanning
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed, environment_of
from tests.pictures import jpeg

OBJECTS = 30
COMMAND_SECONDS = 120.0


@pytest.mark.parametrize("lost", ["vectors", "database", "broker"])
async def test_a_lost_store_is_rebuilt(
    fresh_settings: FreshSettings, tmp_path: Path, lost: Literal["vectors", "database", "broker"]
) -> None:
    before = fresh_settings(ProcessorSettings, session_timeout_seconds=6.0, decode_workers=1)
    async with deployed(before, tmp_path) as deployment:
        worker = deployment.worker()
        await deployment.send([await deployment.put(_key(number), _picture(number)) for number in range(OBJECTS)])
        await deployment.settle()
        assert await worker.stop() == 0
        await deployment.verified()
        await deployment.put(_key(0), _picture(1000))
        await deployment.put(_key(OBJECTS), _picture(OBJECTS))
        await deployment.remove(_key(1))
        if lost == "vectors":
            await _drop_collection(deployment)
    after = before.model_copy(update=_with_an_empty(lost, before, tmp_path))
    (tmp_path / "after").mkdir()
    async with deployed(after, tmp_path / "after") as deployment:
        assert not (await verify(after)).clean
        worker = deployment.worker()
        async with scanning(after):
            await _command(after, tmp_path, "rebuild")
        await deployment.verified()
        indexed = {key for key, row in (await deployment.rows()).items() if row.state is RowState.INDEXED}
        assert indexed == {_key(number) for number in range(OBJECTS + 1)} - {_key(1)}
        embedded = await worker.embedded()
        # All of it, or the one that came and the one that changed. Twice, where the second of two scans (one at the bridge's
        # start, one asked for) looked before the workers were done with the first.
        least = OBJECTS if lost == "vectors" else 2
        assert least <= embedded <= 2 * least


async def test_rows_and_vectors_come_back_from_a_backup(
    fresh_settings: FreshSettings, full_settings: FreshSettings, tmp_path: Path
) -> None:
    """From SQLite to MariaDB. What changed after the backup, and only that, is embedded; generations never go back."""
    before = fresh_settings(ProcessorSettings, session_timeout_seconds=6.0, decode_workers=1)
    async with deployed(before, tmp_path) as deployment:
        worker = deployment.worker()
        await deployment.send([await deployment.put(_key(number), _picture(number)) for number in range(OBJECTS)])
        await deployment.settle()
        await _command(before, tmp_path, "backup", str(tmp_path / "backup"))
        await deployment.send([await deployment.put(_key(0), _picture(1000)), await deployment.remove(_key(1))])
        await deployment.settle()
        assert await worker.stop() == 0
        told = {outcome.data.key: outcome.data.generation for outcome in await deployment.outcomes()}
        await deployment.put(_key(OBJECTS), _picture(OBJECTS))
        await _drop_collection(deployment)
    after = before.model_copy(update={"database_url": full_settings(ProcessorSettings).database_url})
    (tmp_path / "after").mkdir()
    async with deployed(after, tmp_path / "after") as deployment:
        assert not await deployment.rows()
        await _command(after, tmp_path, "restore", str(tmp_path / "backup"))
        assert len(await deployment.rows()) == OBJECTS
        worker = deployment.worker()
        async with scanning(after):
            await _command(after, tmp_path, "rebuild")
        await deployment.verified()
        rows = await deployment.rows()
        assert {key for key, row in rows.items() if row.state is RowState.INDEXED} == {
            _key(number) for number in range(OBJECTS + 1)
        } - {_key(1)}
        assert all(rows[key].generation > generation for key, generation in told.items())
        # The one that came and the one that changed; twice if two scans found them.
        assert 2 <= await worker.embedded() <= 4


def _key(number: int) -> str:
    return f"{number:03}.jpg"


def _picture(seed: int) -> bytes:
    return jpeg(seed, (120, 90))


async def _drop_collection(deployment: Deployment) -> None:
    [model] = await deployment.metadata.models([ModelState.ACTIVE])
    vectors = await vector_store.connect(deployment.settings)
    await vectors.drop_collection(model.collection)
    await vectors.close()


def _with_an_empty(lost: str, settings: ProcessorSettings, folder: Path) -> dict[str, object]:
    if lost == "database":
        empty = f"sqlite+aiosqlite:///{folder / 'empty.db'}"
        return {"database_url": type(settings.database_url)(empty)}
    if lost == "broker":
        return {"kafka_topic_prefix": f"{settings.kafka_topic_prefix}new."}
    return {}


async def _command(settings: ProcessorSettings, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "infra.cli", "--state-dir", str(folder / "none"), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment_of(settings)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(COMMAND_SECONDS):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
