"""Promise: the number and the order of events do not matter (invariants 1 to 3). Real servers, one worker."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from infra.settings import ProcessorSettings
from schemas.events import ObjectEvent, OutcomeType
from schemas.identity import content_hash_of
from schemas.tables import RowState
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.pictures import jpeg

OBJECTS = 60
KEYS_REWRITTEN = 40
LONGEST_SHIFT = 25
"""How far a store may reorder: within some seconds of events, not without end."""


def picture(seed: int) -> bytes:
    return jpeg(seed, (120, 90))


@pytest.fixture(scope="module")
async def deployment(module_settings: FreshSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deployed(module_settings(ProcessorSettings, batch_size=16), tmp_path_factory.mktemp("worker")) as made:
        made.worker()
        await made.send([await made.put("first.jpg", picture(9999))])
        await made.settle()
        yield made
        assert await made.workers[0].stop() == 0


def shuffled_within_a_window(events: list[ObjectEvent], seed: int) -> list[ObjectEvent]:
    dice = random.Random(seed)
    places = {place: place + dice.uniform(0, LONGEST_SHIFT) for place in range(len(events))}
    return [events[place] for place in sorted(places, key=places.__getitem__)]


async def test_every_event_three_times_and_shuffled(deployment: Deployment) -> None:
    before = await deployment.workers[0].embedded()
    events = [await deployment.put(f"thrice/{number:03}.jpg", picture(number)) for number in range(OBJECTS)]
    for sent in shuffled_within_a_window([event for event in events for _ in range(3)], seed=1):
        await deployment.send([sent])
    await deployment.settle()
    assert await deployment.workers[0].embedded() - before == OBJECTS  # not three times that
    told = [outcome for outcome in await deployment.outcomes() if outcome.data.key.startswith("thrice/")]
    assert [outcome.type for outcome in told] == [OutcomeType.INDEXED] * OBJECTS
    await deployment.verified()


async def test_put_delete_put_with_old_events_replayed_last(deployment: Deployment) -> None:
    history: list[ObjectEvent] = []
    for number in range(KEYS_REWRITTEN):
        key = f"again/{number:03}.jpg"
        history.append(await deployment.put(key, picture(1000 + number)))
        history.append(await deployment.remove(key))
        history.append(await deployment.put(key, picture(2000 + number)))
        await deployment.send(history[-3:])
    await deployment.send(shuffled_within_a_window(history, seed=2))
    await deployment.send(history[::3] + history[1::3])  # the old ones last
    await deployment.settle()
    rows = await deployment.rows()
    for number in range(KEYS_REWRITTEN):
        row = rows[f"again/{number:03}.jpg"]
        assert (row.state, row.content_hash) == (RowState.INDEXED, content_hash_of(picture(2000 + number)))
    await deployment.verified()
