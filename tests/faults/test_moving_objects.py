"""Promise: an object that changes while a worker has it in hand ends as the bucket says: its row, its vector, or neither.

The fault bites: a whole batch stands still after its rows were looked up and before its objects are read, or after they were
embedded and before anything is written. Then a tenth of its objects is overwritten and a tenth deleted, and it goes on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from infra.settings import ProcessorSettings
from schemas.events import ObjectEvent, OutcomeType
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.failpoints import Gate, hold_after
from tests.numbered import Numbered

OBJECTS = 40
LOOKED_UP, EMBEDDED = 3, 7


@pytest.mark.parametrize("step", [LOOKED_UP, EMBEDDED])
async def test_objects_that_change_in_the_hands_of_a_worker(fresh_settings: FreshSettings, tmp_path: Path, step: int) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, batch_size=OBJECTS, batches_in_flight=1)
    async with deployed(settings, tmp_path) as deployment:
        gate = Gate(tmp_path / "gate")
        worker = deployment.worker(hold_after(step, gate))
        objects = Numbered(deployment, OBJECTS)
        sent = await objects.put()
        await deployment.send_as_one_batch(sent, worker, gate)
        changes = await objects.change()
        gate.open()
        await deployment.settle()
        old_bytes_written = step == EMBEDDED
        await _assert_first_written(deployment, objects, sent, old_bytes=old_bytes_written)

        await deployment.send(changes)
        await deployment.settle()
        await objects.assert_as_the_bucket_says()
        told = Counter(outcome.type for outcome in await deployment.outcomes())
        if old_bytes_written:
            assert await worker.embedded() == 1 + OBJECTS + len(objects.overwritten)
            assert told[OutcomeType.UPDATED] == len(objects.overwritten)
            assert told[OutcomeType.DELETED] == len(objects.deleted)
        else:
            assert await worker.embedded() == 1 + OBJECTS - len(objects.deleted)
            assert told == {OutcomeType.INDEXED: 1 + OBJECTS - len(objects.deleted)}
        assert await worker.stop() == 0


async def _assert_first_written(deployment: Deployment, objects: Numbered, sent: list[ObjectEvent], *, old_bytes: bool) -> None:
    """Before anybody told the worker of the changes."""
    announced = {event.data.key: event.data.etag for event in sent}
    rows = await deployment.rows()
    for key in objects.overwritten:
        assert (rows[key].state, rows[key].etag == announced[key]) == (RowState.INDEXED, old_bytes)
    for key in objects.deleted:
        assert rows[key].state is (RowState.INDEXED if old_bytes else RowState.DELETED)
    if not old_bytes:
        await objects.assert_as_the_bucket_says()
