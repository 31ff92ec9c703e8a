"""Does this host compute the vectors that the reference computed? Asked at every start."""

from __future__ import annotations

from importlib import resources

import numpy as np
from pydantic import BaseModel, ConfigDict

from infra.errors import ConfigurationError
from processors.decode import decode
from processors.embedding.catalog import ModelDescription
from processors.embedding.embedder import Embedder
from processors.raster import DecodeRules

GOLDEN_COSINE = 0.9999
"""Least cosine of a vector to the reference's, at fp32."""

_FOLDER = resources.files("processors.embedding").joinpath("golden")


class GoldenVectors(BaseModel):
    """`vectors`: name of a picture beside the file to the vector that the torch backend made of it."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    vectors: dict[str, list[float]]


def golden_vectors(description: ModelDescription) -> GoldenVectors | None:
    """Those that come with the package; None for a model that has none."""
    file = _FOLDER.joinpath(f"{description.name}.json")
    return GoldenVectors.model_validate_json(file.read_bytes()) if file.is_file() else None


def golden_picture(name: str) -> bytes:
    return _FOLDER.joinpath(name).read_bytes()


async def check_golden(embedder: Embedder, description: ModelDescription) -> float | None:
    """The least cosine to the golden vectors; None for a model without. Decodes and embeds two small pictures.

    Raises ConfigurationError when this host computes something else: its vectors would not fit those in the collection.
    """
    golden = golden_vectors(description)
    if golden is None:
        return None
    if golden.fingerprint != embedder.fingerprint:
        raise ConfigurationError(
            f"the golden vectors of {description.name} are of another fingerprint ({golden.fingerprint[:16]}) than the model "
            f"that runs ({embedder.fingerprint[:16]}): make them anew, see processors/embedding/golden/README.md"
        )
    rules = DecodeRules(*description.input_size, max_pixels=1_000_000, min_side=1)
    pixels = np.stack([decode(golden_picture(name), rules).pixels for name in golden.vectors])
    expected = np.array(list(golden.vectors.values()), dtype=np.float32)
    least = float(np.min(np.sum(await embedder.embed(pixels) * expected, axis=1)))
    if not least >= GOLDEN_COSINE:
        raise ConfigurationError(
            f"this host computes other vectors for {description.name} than the reference did (cosine {least:.6f}, at least "
            f"{GOLDEN_COSINE} is needed), so its searches would not fit what is indexed. Try IMAGE_SEARCH_MODEL_BACKEND=torch, "
            "and remove the folder of converted models in the cache to have them made again."
        )
    return least
