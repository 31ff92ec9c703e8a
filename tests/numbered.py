"""Numbered objects, of which a tenth is overwritten and a tenth deleted, and what must have become of them."""

from __future__ import annotations

from schemas.events import ObjectEvent
from schemas.identity import content_hash_of
from schemas.tables import RowState
from tests.deployment import Deployment
from tests.pictures import jpeg

PICTURE_SIZE = (120, 90)
_VERSIONS_APART = 100_000


class Numbered:
    """`count` objects below a folder. Every tenth from 0 is overwritten, every tenth from 5 is deleted."""

    def __init__(self, deployment: Deployment, count: int, *, folder: str = "numbered", first_seed: int = 1) -> None:
        self.keys = [f"{folder}/{number:04}.jpg" for number in range(count)]
        self.overwritten, self.deleted = self.keys[0::10], self.keys[5::10]
        self._deployment = deployment
        self._seeds = {key: first_seed + number for number, key in enumerate(self.keys)}
        self._expected: dict[str, bytes | None] = {}

    async def put(self) -> list[ObjectEvent]:
        """Put all of them. The events are not yet sent."""
        return [await self._put(key, self._seeds[key]) for key in self.keys]

    async def change(self) -> list[ObjectEvent]:
        """Overwrite a tenth and delete a tenth. The events are not yet sent."""
        events = [await self._put(key, self._seeds[key] + _VERSIONS_APART) for key in self.overwritten]
        for key in self.deleted:
            events.append(await self._deployment.remove(key))
            self._expected[key] = None
        return events

    async def assert_as_the_bucket_says(self) -> None:
        """Each row is of the object's own bytes, what is gone is gone, and verify finds nothing."""
        rows = await self._deployment.rows()
        found = {key: (rows[key].state, rows[key].content_hash) if key in rows else None for key in self.keys}
        assert found == {key: _row_of(data) for key, data in self._expected.items()}
        await self._deployment.verified()

    async def _put(self, key: str, seed: int) -> ObjectEvent:
        data = jpeg(seed, PICTURE_SIZE)
        event = await self._deployment.put(key, data)
        self._expected[key] = data
        return event


def _row_of(data: bytes | None) -> tuple[RowState, bytes | None]:
    return (RowState.DELETED, None) if data is None else (RowState.INDEXED, content_hash_of(data))
