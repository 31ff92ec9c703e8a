"""What can be asked of bridge and workers: the arguments of their jobs, as they are stored and as the API takes them."""

from __future__ import annotations

import shlex
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from schemas.events import Hex64, ReasonCode
from schemas.filter import BucketName, checked_key

Prefix = Annotated[str, Field(max_length=1024), AfterValidator(checked_key)]


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ScanArguments(_Arguments):
    """Compare a bucket with what is indexed, and have the workers mend what differs."""

    bucket: BucketName
    prefix: Prefix = Field("", description="Only keys that start with this.")
    allow_removal: bool = Field(False, description="Remove however many objects are gone from the bucket.")

    def command(self) -> str:
        """How a person asks for the same scan."""
        prefix = f" --prefix {shlex.quote(self.prefix)}" if self.prefix else ""
        return f"image-search scan --bucket {self.bucket}{prefix}"


class JobPlace(_Arguments):
    bucket: BucketName
    prefix: Prefix = ""


class RetryArguments(_Arguments):
    """Try failed objects again: all below these places, or the one that is named."""

    places: tuple[JobPlace, ...]
    reason: ReasonCode | None = None
    object_id: Hex64 | None = None


class VerifyArguments(_Arguments):
    """Compare bucket, rows and vectors from outside. Changes nothing."""

    bucket: BucketName | None = Field(None, description="Only this bucket; without it all that are followed.")
    prefix: Prefix = Field("", description="Only keys that start with this.")


class ReindexArguments(_Arguments):
    """Fill a second collection: the settings that name the new model. Those left out are the worker's.

    But a projection and a calibration that are not named are none, or no model could be had without them again; and what the
    worker's settings say of one model is not said of another.
    """

    model: str = Field(min_length=1, max_length=64)
    model_precision: str | None = None
    calibration_sha256: str = ""
    own_weights: str | None = None
    weights_sha256: str | None = None
    own_format: str | None = None
    own_network: str | None = None
    own_dimension: int | None = None
    own_input_pixels: int | None = None
    projection: str | None = None
    projection_sha256: str | None = None
    projection_dimension: int | None = None


class ModelArguments(_Arguments):
    """A model by its name, or by the beginning of its fingerprint where two have one name."""

    model: str = Field(min_length=1, max_length=64)
