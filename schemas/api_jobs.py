"""The HTTP API of whoever runs a deployment: failures, jobs and models."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AwareDatetime, BaseModel, Field, model_validator

from schemas.api import Filtered, Image, Limit, Parameters
from schemas.events import Hex64, ReasonCode
from schemas.filter import BucketName
from schemas.jobs import Prefix
from schemas.tables import JobKind, JobState, ModelState

JobId = Annotated[str, Field(pattern=r"^[0-9a-f-]{36}$")]


class FailureParameters(Filtered):
    reason: ReasonCode | None = Field(None, description="Only failures of this kind.")
    limit: Limit | None = Field(None, description="Most entries of a page; the service's default when absent.")
    cursor: str | None = Field(None, max_length=4096, description="`next` of the page before.")


class FailurePage(BaseModel):
    failures: list[Image] = Field(description="In the byte order of bucket and key.")
    by_reason: dict[str, int] = Field(description="How many there are below this bucket and prefix, for each reason.")
    limit: int
    next: str | None = Field(description="Cursor of the next page; null on the last.")


class RetryRequest(Parameters):
    """One by its id; those of a reason; or all. Also of a bucket and prefix only."""

    id: Hex64 | None = None
    reason: ReasonCode | None = None
    all: bool = False
    bucket: BucketName | None = None
    prefix: Prefix = ""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.id is not None) + (self.reason is not None) + self.all != 1:
            raise ValueError("give one of id, reason and all")
        if self.id is not None and (self.bucket is not None or self.prefix):
            raise ValueError("an id says where it is: no bucket and no prefix beside it")
        return self


class JobParameters(Parameters):
    kind: JobKind | None = Field(None, description="Only jobs of this kind.")
    limit: Limit = 100


class JobAnswer(BaseModel):
    job_id: str
    kind: JobKind
    state: JobState
    arguments: dict[str, Any]
    progress: dict[str, Any] = Field(description="How far it is, in numbers that depend on the kind.")
    message: str | None = Field(description="What was done, or why not.")
    created_at: AwareDatetime
    updated_at: AwareDatetime


class JobList(BaseModel):
    jobs: list[JobAnswer] = Field(description="The newest first.")


class ModelAnswer(BaseModel):
    name: str
    state: ModelState
    fingerprint: str
    precision: str
    backend: str
    dimension: int
    collection: str
    filled: int = Field(description="How many indexed objects it holds a vector of.")
    indexed: int
    created_at: AwareDatetime


class ModelList(BaseModel):
    models: list[ModelAnswer]
