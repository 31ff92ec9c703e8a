"""What one searches with over HTTP when it is more than one picture: JSON, examples, several searches at once."""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from schemas.api import (
    ErrorAnswer,
    Include,
    Limit,
    Offset,
    Parameters,
    Prefix,
    SearchAnswer,
    WaitFor,
    checked_box,
)
from schemas.events import Hex64
from schemas.filter import BucketName, Filter, FilterGroup, within_bounds

MOST_EXAMPLES = 16
MOST_SEARCHES = 32
LONGEST_VECTOR = 8192
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


def _decoded(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("base64 is a text")
    try:
        # The library's own type passes over what is no base64.
        return b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("this is no base64") from None


Base64 = Annotated[bytes, BeforeValidator(_decoded, json_schema_input_type=str), Field(json_schema_extra={"format": "byte"})]

_SOURCES = ("base64", "id", "vector")


def _not_zero(vector: tuple[float, ...]) -> tuple[float, ...]:
    if not any(math.fabs(value) > 0 for value in vector):
        raise ValueError("a vector of zeros points nowhere")
    return vector


class Source(Parameters):
    """One thing to search with: exactly one of a picture's bytes, a stored object's id, and a vector of the model."""

    base64: Base64 | None = Field(None, description="A picture's bytes.")
    id: Hex64 | None = Field(None, description="A stored object, which is left out of the hits.")
    vector: Annotated[tuple[Number, ...], Field(min_length=1, max_length=LONGEST_VECTOR), AfterValidator(_not_zero)] | None = (
        Field(None, description="As many floats as the model has; its length does not matter.")
    )
    box: Annotated[tuple[Share, Share, Share, Share], AfterValidator(checked_box)] | None = Field(
        None, description="Of the picture only this part: left, top, right, bottom as shares of the upright picture."
    )

    @model_validator(mode="after")
    def _box_is_of_a_picture(self) -> Self:
        if self.box is not None and self.base64 is None:
            raise ValueError("box is a part of the picture in base64")
        return self

    @property
    def given(self) -> int:
        return sum(getattr(self, name) is not None for name in _SOURCES)


class Example(Source):
    weight: float = Field(1.0, gt=0, le=100, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.given != 1:
            raise ValueError("give exactly one of base64, id and vector")
        return self


class SearchBody(Source):
    """Exactly one of `base64`, `id`, `vector` and `positive`."""

    positive: tuple[Example, ...] = Field(
        (), max_length=MOST_EXAMPLES, description="Search for what is like all of these, by their weights."
    )
    negative: tuple[Example, ...] = Field(
        (), max_length=MOST_EXAMPLES, description="And unlike these; together they must not outweigh the others."
    )
    bucket: BucketName | None = None
    prefix: Prefix = ""
    filter: Annotated[FilterGroup, AfterValidator(within_bounds)] | None = None
    limit: Limit | None = None
    offset: Offset = 0
    min_score: float | None = Field(None, ge=-100, le=100, allow_inf_nan=False)
    max_distance: float | None = Field(None, ge=0, le=4, allow_inf_nan=False)
    group_by: Literal["content_hash"] | None = None
    include: frozenset[Include] = frozenset()
    model: str | None = Field(None, min_length=1, max_length=64)
    wait_for: WaitFor | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.given + bool(self.positive) != 1:
            raise ValueError("give exactly one of base64, id, vector and positive")
        return self

    @property
    def narrow(self) -> Filter:
        return Filter(self.bucket, self.prefix, self.filter)

    @property
    def examples(self) -> list[tuple[float, Source]]:
        """Each with its weight, below 0 for what hits shall be unlike."""
        alike: list[tuple[float, Source]] = [(example.weight, example) for example in self.positive]
        return [*(alike or [(1.0, self)]), *((-example.weight, example) for example in self.negative)]


class BatchBody(Parameters):
    searches: tuple[SearchBody, ...] = Field(min_length=1, max_length=MOST_SEARCHES)


class BatchResult(BaseModel):
    """`answer` for 200, `error` for any other status."""

    status: int
    answer: SearchAnswer | None = None
    error: ErrorAnswer | None = None


class BatchAnswer(BaseModel):
    results: list[BatchResult] = Field(description="One for each search, in their order.")


class CompareBody(Parameters):
    one: Example
    other: Example
    model: str | None = Field(None, min_length=1, max_length=64)


class CompareAnswer(BaseModel):
    score: float = Field(description="100 × cosine: 100 is the same, can be below 0.")
    distance: float = Field(description="Squared L2 of unit vectors: 0 is the same, 4 the opposite.")
    model: str
