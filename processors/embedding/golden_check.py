"""Does this host compute the vectors that the reference computed? Asked at every start."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from infra.errors import ConfigurationError
from processors.decode import decode
from processors.embedding.catalog import FittedProjection, ModelDescription, Precision, fingerprint, precision_of
from processors.embedding.embedder import Embedder, Pixels, Vectors
from processors.raster import DecodeRules

GOLDEN_COSINE: Final[dict[Precision, float]] = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.99}
"""Least cosine of a vector to the reference's, which is always of fp32."""

GOLDEN_PICTURES: Final = ("hills.jpg", "houses.png")

_FOLDER = resources.files("processors.embedding").joinpath("golden")


class GoldenVectors(BaseModel):
    """`vectors`: name of a picture beside the file to the vector that the torch backend made of it, in fp32.

    `fingerprint`: of the model in fp32.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    vectors: dict[str, list[float]]


def golden_vectors(description: ModelDescription) -> GoldenVectors | None:
    """Those that come with the package; None for a model that has none, and for one with a projection of one's own."""
    if isinstance(description.projection, FittedProjection):
        return None
    file = _FOLDER.joinpath(f"{description.name}.json")
    return GoldenVectors.model_validate_json(file.read_bytes()) if file.is_file() else None


def golden_of(description: ModelDescription, reference: Vectors) -> GoldenVectors:
    """For a model without shipped ones: `reference` is what torch in fp32 on this host's processor made of golden_pixels."""
    vectors = dict(zip(GOLDEN_PICTURES, reference.tolist(), strict=True))
    return GoldenVectors(fingerprint=fingerprint(description, "fp32"), vectors=vectors)


def golden_picture(name: str) -> bytes:
    return _FOLDER.joinpath(name).read_bytes()


def golden_pixels(description: ModelDescription, names: Iterable[str] = GOLDEN_PICTURES) -> Pixels:
    rules = DecodeRules(*description.input_size, max_pixels=1_000_000, min_side=1)
    return np.stack([decode(golden_picture(name), rules).pixels for name in names])


async def check_golden(embedder: Embedder, description: ModelDescription) -> float | None:
    """The least cosine to the golden vectors; None for a model without. Decodes and embeds two small pictures.

    Raises ConfigurationError when this host computes something else: its vectors would not fit those in the collection.
    """
    golden = golden_vectors(description)
    if golden is None:
        return None
    precision = precision_of(description, embedder.fingerprint)
    if precision is None or golden.fingerprint != fingerprint(description, "fp32"):
        raise ConfigurationError(
            f"the golden vectors of {description.name} are of another fingerprint ({golden.fingerprint[:16]}) than the model "
            f"that runs ({embedder.fingerprint[:16]}): make them anew, see processors/embedding/golden/README.md"
        )
    vectors = await embedder.embed(golden_pixels(description, golden.vectors))
    return held_to(golden, vectors, description.name, precision)


def held_to(golden: GoldenVectors, vectors: Vectors, name: str, precision: Precision) -> float:
    """The least cosine of `vectors` to the golden ones. Raises ConfigurationError when it is too low."""
    expected = np.array(list(golden.vectors.values()), dtype=np.float32)
    least, needed = float(np.min(np.sum(vectors * expected, axis=1))), GOLDEN_COSINE[precision]
    if not least >= needed:
        raise ConfigurationError(
            f"this host computes other vectors for {name} in {precision} than the reference did (cosine {least:.6f}, at least "
            f"{needed} is needed), so its searches would not fit what is indexed. Try IMAGE_SEARCH_MODEL_BACKEND=torch with "
            "IMAGE_SEARCH_MODEL_DEVICE=cpu, and remove the folder of converted models in the cache to have them made again."
            + (" Or IMAGE_SEARCH_MODEL_PRECISION=fp32, for a new collection." if precision != "fp32" else "")
        )
    return least
