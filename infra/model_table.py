"""Which model answers, as the table of models says it: one is found by its name, and the previous one answers again."""

from __future__ import annotations

from collections.abc import Sequence

from infra.errors import PermanentError
from infra.metadata_store.interface import MetadataStore, ModelRow
from schemas.tables import KEPT_STATES, ModelState


class ModelChangeRefused(PermanentError):
    """A change that would break a promise. The message says what to do first."""


def find_model(rows: Sequence[ModelRow], name: str, states: frozenset[ModelState] = KEPT_STATES) -> ModelRow:
    """Raises ModelChangeRefused when there is none, or more than one."""
    among = [row for row in rows if row.state in states]
    found = [row for row in among if row.name == name or row.fingerprint.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{row.name} ({row.fingerprint[:12]}, {row.state})" for row in among) or "none"
    if not found:
        raise ModelChangeRefused(f"there is no model {name!r} to choose from: {known}")
    raise ModelChangeRefused(f"{name!r} is the name of several models; say the fingerprint's beginning: {known}")


async def roll_back(metadata: MetadataStore) -> ModelRow:
    """Let the previous model answer again. It was kept equal to the bucket all the time, so nothing is lost."""
    rows = await metadata.models()
    previous = next((row for row in rows if row.state is ModelState.PREVIOUS), None)
    if previous is None:
        raise ModelChangeRefused("there is no previous model to go back to: image-search models list")
    active = next(row for row in rows if row.state is ModelState.ACTIVE)
    moves = {
        active.fingerprint: (ModelState.ACTIVE, ModelState.PREVIOUS),
        previous.fingerprint: (ModelState.PREVIOUS, ModelState.ACTIVE),
    }
    if not await metadata.move_models(moves):
        raise ModelChangeRefused("somebody else changed the models meanwhile: look at image-search models list")
    return previous
