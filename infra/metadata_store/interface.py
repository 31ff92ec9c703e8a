"""What we need of the SQL store. `sql.py` is the real adapter, `memory.py` the twin; one contract suite holds both."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from schemas.access import Grant
from schemas.events import OutcomeEvent, ReasonCode
from schemas.filter import FilterGroup
from schemas.identity import ContentHash, ModelFingerprint, ObjectId, ObjectRef
from schemas.metadata import Metadata
from schemas.tables import JobState, ModelState, RowState


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One row of `images` as seen: whatever is written next must start from this generation.

    Written with a time of 0, a row gets the store's; `created_at_us` stays what the first write made it.
    """

    ref: ObjectRef
    state: RowState
    generation: int
    published_generation: int
    content_hash: ContentHash | None = None
    md5: bytes | None = None
    etag: str | None = None
    version: str | None = None
    put_time_us: int | None = None
    size: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    reason: ReasonCode | None = None
    message: str | None = None
    attempt: int = 1
    owed_outcomes: tuple[OutcomeEvent, ...] = ()
    created_at_us: int = 0
    updated_at_us: int = 0

    @property
    def object_id(self) -> ObjectId:
        return self.ref.object_id

    @property
    def is_published(self) -> bool:
        return self.published_generation >= self.generation

    def with_published(self) -> ImageRow:
        return replace(self, published_generation=self.generation, owed_outcomes=())


@dataclass(frozen=True, slots=True)
class RowWrite:
    """Write `row` only if the stored generation is still `seen_generation` (0: no row yet). `row.generation` is one more.

    `models`: which fingerprints hold a vector of `row.content_hash` after this write; the others are forgotten.
    """

    row: ImageRow
    seen_generation: int
    models: frozenset[ModelFingerprint] = frozenset()


@dataclass(frozen=True, slots=True)
class ModelRow:
    fingerprint: ModelFingerprint
    name: str
    collection: str
    dimension: int
    backend: str
    precision: str
    description: Mapping[str, Any]
    state: ModelState
    created_at_us: int


@dataclass(frozen=True, slots=True)
class Job:
    job_id: str
    kind: str
    arguments: Mapping[str, Any]
    state: JobState
    progress: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    owner: str | None = None
    lease_until_us: int = 0
    created_at_us: int = 0
    updated_at_us: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    position: int
    clean: bool


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of the HTTP API as it is kept: `key_id` may be shown, the key itself is known to nobody but its holder."""

    key_id: str
    secret_hash: bytes
    name: str
    grant: Grant
    created_at_us: int = 0
    expires_at_us: int | None = None
    last_used_at_us: int | None = None
    revoked_at_us: int | None = None

    def is_good_at(self, now_us: int) -> bool:
        return self.revoked_at_us is None and (self.expires_at_us is None or now_us < self.expires_at_us)


class MetadataStore(Protocol):
    """Every method raises StoreUnavailable; transactions are short and retried whole on deadlock."""

    # -- images ------------------------------------------------------------------------------------------------------
    async def rows(self, ids: Collection[ObjectId]) -> dict[ObjectId, ImageRow]:
        """The rows of these objects, in one query. Those without a row are left out."""

    async def models_of(self, ids: Collection[ObjectId]) -> dict[ObjectId, dict[ModelFingerprint, ContentHash]]:
        """Which models hold a vector of each object, and of which bytes. One query."""

    async def write(self, writes: Sequence[RowWrite]) -> set[ObjectId]:
        """One transaction, in the order of object ids. Returns the objects that another writer had moved on: not written."""

    async def mark_published(self, published: Mapping[ObjectId, int]) -> None:
        """Raise `published_generation` to the given generation (never lower it); clear owed outcomes of exactly that one."""

    async def indexed_with_content(self, hashes: Collection[ContentHash]) -> dict[ContentHash, list[ObjectId]]:
        """Objects whose row is indexed with these bytes, oldest first, at most 8 for each content. One query."""

    async def count_with_content(
        self, hashes: Collection[ContentHash], *, where: FilterGroup | None = None
    ) -> dict[ContentHash, int]:
        """How many indexed rows, of those that the filter matches, have these bytes. One query."""

    async def list_rows(
        self,
        *,
        bucket: str | None = None,
        prefix: str = "",
        where: FilterGroup | None = None,
        states: Collection[RowState] | None = None,
        reason: str | None = None,
        after: ObjectRef | None = None,
        limit: int = 1000,
    ) -> list[ImageRow]:
        """Rows in the byte order of (bucket, key), behind `after`."""

    async def counts(self, *, bucket: str | None = None, prefix: str = "") -> dict[RowState, int]: ...

    async def failures_by_reason(self, *, bucket: str | None = None, prefix: str = "") -> dict[str, int]:
        """How many rows have failed for which reason."""

    async def unpublished(self, limit: int = 1000) -> list[ImageRow]:
        """Rows that still owe an outcome."""

    async def purge_deleted(self, *, before_us: int, limit: int = 1000) -> int:
        """Forget published deleted rows last updated before this time; returns how many."""

    # -- models ------------------------------------------------------------------------------------------------------
    async def models(self, states: Collection[ModelState] | None = None) -> list[ModelRow]: ...

    async def add_model(self, model: ModelRow) -> ModelRow:
        """Insert, or return what stands there under this fingerprint. A second `active` model is refused (ValueError)."""

    async def move_models(self, moves: Mapping[ModelFingerprint, tuple[ModelState, ModelState]]) -> bool:
        """One transaction: each of these models from the first state to the second.

        False, and nothing was changed, when one of them is in another state by now. Whether any is active afterwards is for
        the caller to see to; two active ones are refused (ValueError).
        """

    async def model_coverage(self, model: ModelFingerprint) -> tuple[int, int]:
        """Of how many indexed rows this model holds a vector of the row's bytes, and how many indexed rows there are. As of
        one moment."""

    async def forget_model(self, model: ModelFingerprint, *, limit: int = 1000) -> int:
        """Forget for some rows that this model holds a vector of them; returns how many those were."""

    # -- jobs --------------------------------------------------------------------------------------------------------
    async def add_job(self, kind: str, arguments: Mapping[str, Any]) -> Job: ...

    async def job(self, job_id: str) -> Job | None: ...

    async def claim_job(self, kinds: Collection[str], *, owner: str, lease_seconds: float) -> Job | None:
        """Take the oldest queued job of these kinds, or a running one whose lease has run out. One owner at a time."""

    async def update_job(
        self,
        job_id: str,
        *,
        owner: str,
        state: JobState,
        progress: Mapping[str, Any],
        message: str | None = None,
        lease_seconds: float = 0.0,
    ) -> bool:
        """False when this owner lost the lease: stop working on it."""

    async def unfinished_jobs(self, kind: str) -> list[Job]: ...

    async def list_jobs(self, *, kinds: Collection[str] | None = None, limit: int = 100) -> list[Job]:
        """The newest first."""

    # -- cursors -----------------------------------------------------------------------------------------------------
    async def cursor(self, name: str) -> Cursor | None: ...

    async def save_cursor(self, name: str, cursor: Cursor) -> None: ...

    # -- buckets -----------------------------------------------------------------------------------------------------
    async def added_buckets(self) -> list[str]:
        """Buckets that are followed besides those of the settings, by name."""

    async def add_bucket(self, bucket: str) -> None:
        """Adding what is there is no error. Where its change log was left off at an earlier time is forgotten: the scan that a
        new bucket gets finds what happened since, and the log of the other buckets need not be read again from there."""

    async def remove_bucket(self, bucket: str) -> bool:
        """Forgets no row of an image. False when it was not there."""

    # -- API keys ----------------------------------------------------------------------------------------------------
    async def add_api_key(self, key: ApiKey) -> ApiKey:
        """As it is stored: created now. Its id is taken by no other key, which whoever drew it at random may rely on."""

    async def api_key(self, key_id: str) -> ApiKey | None:
        """Also one that is revoked or expired: who asks decides what that means."""

    async def api_keys(self) -> list[ApiKey]:
        """All of them, oldest first."""

    async def revoke_api_key(self, key_id: str) -> bool:
        """For good; the first time stays. False when there is no such key."""

    async def note_api_key_uses(self, uses: Mapping[str, int]) -> None:
        """Raise `last_used_at_us` of these keys, never lower it. Keys that are gone are passed over."""

    # -- what people say of images -----------------------------------------------------------------------------------
    async def own_metadata(self, ids: Collection[ObjectId]) -> dict[ObjectId, Metadata]:
        """Of these objects, in one query. Those of which nothing was ever said are left out."""

    async def patch_own_metadata(self, object_id: ObjectId, patch: Mapping[str, Any]) -> Metadata:
        """Merge `patch` into what stands there, in one transaction, and return the whole. ValueError: more than is allowed.

        Stays through overwrites and deletions, until the object's deleted row is purged.
        """

    # -- life --------------------------------------------------------------------------------------------------------
    async def check(self) -> None:
        """Returns when the database answers and has the schema of this version; ConfigurationError names `upgrade`."""

    async def close(self) -> None: ...
