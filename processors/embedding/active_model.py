"""The model that the collection was made with, which is the only one that its vectors can be compared by."""

from __future__ import annotations

from infra.errors import ConfigurationError
from infra.metadata_store.interface import MetadataStore, ModelRow
from schemas.identity import ModelFingerprint
from schemas.tables import ModelState


async def active_model(metadata: MetadataStore, fingerprint: ModelFingerprint, name: str) -> ModelRow:
    """The table of models says which is active. Refuses (ConfigurationError, with what to do) when the settings ask for one
    that was never set up here; one that was, before or after a change of model, is no contradiction.

    Asked before any file of the model is looked for: nobody shall download weights to be told that they do not fit.
    """
    rows = await metadata.models()
    active = next((row for row in rows if row.state is ModelState.ACTIVE), None)
    if active is None:
        raise ConfigurationError("no model has been set up yet. Run: image-search upgrade")
    if fingerprint not in {row.fingerprint for row in rows}:
        raise ConfigurationError(
            f"the collection {active.collection} was made with {active.name} ({active.precision}), fingerprint "
            f"{active.fingerprint[:16]}; the settings now ask for {name}, fingerprint {fingerprint[:16]}. Vectors of two "
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
