"""The model that the collection was made with, which is the only one that its vectors can be compared by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from infra.errors import ConfigurationError
from infra.metadata_store.interface import MetadataStore, ModelRow
from infra.settings import ModelSettings
from processors.embedding.catalog import AUTO, precision_of
from processors.embedding.choice import chosen
from schemas.identity import ModelFingerprint
from schemas.tables import ModelState

Settings = TypeVar("Settings", bound=ModelSettings)


async def active_model(metadata: MetadataStore, asked: ModelFingerprint, name: str) -> ModelRow:
    """The table of models says which is active. Refuses (ConfigurationError, with what to do) when the settings ask for one
    that was never set up here; one that was, before or after a change of model, is no contradiction.

    Asked before any file of the model is looked for: nobody shall download weights to be told that they do not fit.
    """
    rows = await metadata.models()
    active = next((row for row in rows if row.state is ModelState.ACTIVE), None)
    if active is None:
        raise ConfigurationError("no model has been set up yet. Run: image-search upgrade")
    if asked not in {row.fingerprint for row in rows}:
        raise ConfigurationError(
            f"the collection {active.collection} was made with {active.name} ({active.precision}), fingerprint "
            f"{active.fingerprint[:16]}; the settings now ask for {name}, fingerprint {asked[:16]}. Vectors of two "
            f"models cannot be compared: set IMAGE_SEARCH_MODEL={active.name} and "
            f"IMAGE_SEARCH_MODEL_PRECISION={active.precision} again{_files(active)} and run the version that made the "
            "collection; to change the model while it goes on answering: image-search models reindex; or start anew with "
            "`image-search down --wipe`"
        )
    return active


def _files(active: ModelRow) -> str:
    weights = (active.description.get("weights") or {}).get("sha256")
    if not weights:
        return ""
    fitted = ((active.description.get("projection") or {}).get("file") or {}).get("sha256")
    projection = f"and the projection whose sha256 is {fitted}" if fitted else "and without IMAGE_SEARCH_PROJECTION"
    return f" (with the weights whose sha256 is {weights}, {projection})"


async def settled(settings: Settings, metadata: MetadataStore) -> Settings:
    """With what the settings leave to the collection: the precision that `auto` found, and what int8 was calibrated on.

    Both were chosen once, by the host that made it. Raises ConfigurationError when there is none.
    """
    if settings.model_precision not in (AUTO, "int8"):
        return settings
    rows = await metadata.models()
    if not rows:
        raise ConfigurationError("no model has been set up yet. Run: image-search upgrade")
    found = settled_by(settings, rows)
    if found is not None:
        return found
    # Of another model there is nothing to take; who compares fingerprints says that it is another one.
    active = next((row for row in rows if row.state is ModelState.ACTIVE), rows[0])
    return _as_made(settings, active)


def settled_by(settings: Settings, rows: Sequence[ModelRow]) -> Settings | None:
    """As a collection of the very model that the settings name was made, the active one first; None where there is none."""
    for row in sorted(rows, key=lambda row: (row.state is not ModelState.ACTIVE, -row.created_at_us)):
        made = _as_made(settings, row)
        # Not by the name: two checkpoints of one's own have the same.
        if precision_of(chosen(made), row.fingerprint) == made.model_precision:
            return made
    return None


def _as_made(settings: Settings, row: ModelRow) -> Settings:
    """With the row's precision for `auto`, and with what its int8 was calibrated on; what the settings do name stays."""
    precision = row.precision if settings.model_precision == AUTO else settings.model_precision
    calibration = row.description.get("calibration", "") if precision == row.precision == "int8" else ""
    return settings.model_copy(
        update={"model_precision": precision, "calibration_sha256": settings.calibration_sha256 or calibration}
    )
