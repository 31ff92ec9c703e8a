"""What people ask of the bridge besides scans: failed objects are tried again, and the stores compared from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial

from infra.followed_buckets import followed_buckets
from infra.jobs import JobTurnedDown, JobWorker, Work
from infra.metadata_store.interface import ImageRow, Job, MetadataStore
from infra.object_store.interface import ObjectStore
from infra.settings import BridgeSettings
from infra.vector_store.interface import VectorStore
from infra.verify import Report, verify_stores
from ingest_bridge.comparison import Difference
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_state import ScanProgress
from schemas.events import Cause, ObjectEvent
from schemas.identity import ObjectRef, object_id_from_hex
from schemas.jobs import JobPlace, RetryArguments, VerifyArguments
from schemas.tables import JobKind, RowState

ROWS_PAGE = 1000
MOST_ASKED_ATTEMPTS = 20
"""More than a scan makes by itself, so that there are some left for a person; and an end, for what asks in a loop."""
MOST_LISTED = 100
"""Findings of each kind in the answer of a verification: a job's progress is one column."""

MakeEvents = Callable[[str, ScanProgress], ScanEvents]
"""Of a job's id and how far it had come."""


class Retry:
    """Events for failed objects, also for those that a scan would not try again: whoever asks has mended the reason."""

    def __init__(
        self, arguments: RetryArguments, progress: ScanProgress, *, events: ScanEvents, metadata: MetadataStore
    ) -> None:
        self._arguments, self._progress, self._events, self._metadata = arguments, progress, events, metadata
        self._exhausted = 0

    def told(self) -> Mapping[str, object]:
        return {"written": self._progress.written, "exhausted": self._exhausted}

    async def run(self) -> str:
        async for rows in self._failed_rows():
            await self._events.write(await self._events_for(rows))
        left = f"; {self._exhausted} had {MOST_ASKED_ATTEMPTS} attempts already: put them anew" if self._exhausted else ""
        return f"{self._progress.written} failed objects are tried again{left}"

    async def _events_for(self, rows: Sequence[ImageRow]) -> list[ObjectEvent]:
        to_try = [row for row in rows if row.attempt < MOST_ASKED_ATTEMPTS]
        self._exhausted += len(rows) - len(to_try)
        events: list[ObjectEvent] = []
        for row, stat in zip(to_try, await self._events.stats([row.ref for row in to_try]), strict=True):
            if stat is None:
                events.append(self._events.gone(row.ref, Cause.RETRY))
            elif event := self._events.changed(stat, Difference(Cause.RETRY, row.attempt + 1)):
                events.append(event)
        return events

    async def _failed_rows(self) -> AsyncIterator[list[ImageRow]]:
        if self._arguments.object_id is not None:
            one = object_id_from_hex(self._arguments.object_id)
            found = await self._events.patiently(partial(self._metadata.rows, [one]))
            yield self._asked_for(list(found.values()))
            return
        for place in self._arguments.places:
            after: ObjectRef | None = None
            while rows := await self._events.patiently(partial(self._page, place, after)):
                after = rows[-1].ref
                yield self._asked_for(rows)

    async def _page(self, place: JobPlace, after: ObjectRef | None) -> list[ImageRow]:
        return await self._metadata.list_rows(
            bucket=place.bucket, prefix=place.prefix, states=[RowState.FAILED], after=after, limit=ROWS_PAGE
        )

    def _asked_for(self, rows: Sequence[ImageRow]) -> list[ImageRow]:
        reason = self._arguments.reason
        return [row for row in rows if row.state is RowState.FAILED and (reason is None or row.reason == reason)]


class Verification:
    """Nothing is changed, so one that was broken off simply begins anew."""

    def __init__(
        self,
        arguments: VerifyArguments,
        settings: BridgeSettings,
        *,
        objects: ObjectStore,
        metadata: MetadataStore,
        vectors: VectorStore,
    ) -> None:
        self._arguments, self._settings = arguments, settings
        self._objects, self._metadata, self._vectors = objects, metadata, vectors
        self._told: dict[str, object] = {}

    def told(self) -> Mapping[str, object]:
        return dict(self._told)

    async def run(self) -> str:
        followed = await followed_buckets(self._settings, self._metadata)
        bucket = self._arguments.bucket
        if bucket is not None and bucket not in followed:
            raise JobTurnedDown(f"the bucket {bucket!r} is not followed: image-search buckets add {bucket}")
        report = await verify_stores(
            self._objects,
            self._metadata,
            self._vectors,
            buckets=followed if bucket is None else [bucket],
            prefix=self._arguments.prefix,
            progress=self._tell,
        )
        self._told = _as_told(report)
        if report.clean:
            return "bucket, rows and vectors are equal"
        counts = ", ".join(f"{found.total} {kind}" for kind, found in report.findings.items() if found.total)
        return f"bucket, rows and vectors are not equal: {counts}"

    def _tell(self, what: str, number: int) -> None:
        self._told[what] = number


def _as_told(report: Report) -> dict[str, object]:
    return {
        "clean": report.clean,
        "objects": report.objects,
        "rows": dict(report.rows),
        "vectors": dict(report.vectors),
        "findings": {
            kind: {
                "total": found.total,
                "listed": [
                    {"bucket": one.bucket, "key": one.key, "id": one.object_id, "detail": one.detail}
                    for one in found.listed[:MOST_LISTED]
                ],
            }
            for kind, found in report.findings.items()
            if found.total
        },
    }


class AskedJobs(JobWorker):
    """Beside the worker of scans: a person does not wait for a scan of hours."""

    def __init__(
        self,
        settings: BridgeSettings,
        *,
        objects: ObjectStore,
        metadata: MetadataStore,
        vectors: VectorStore,
        make_events: MakeEvents,
        owner: str,
    ) -> None:
        super().__init__(metadata, [JobKind.RETRY, JobKind.VERIFY], owner=owner)
        self._settings, self._objects, self._vectors, self._make_events = settings, objects, vectors, make_events

    async def open(self, job: Job) -> Work:
        if job.kind == JobKind.VERIFY:
            return Verification(
                VerifyArguments.model_validate(job.arguments),
                self._settings,
                objects=self._objects,
                metadata=self._metadata,
                vectors=self._vectors,
            )
        progress = ScanProgress()
        return Retry(
            RetryArguments.model_validate(job.arguments),
            progress,
            events=self._make_events(job.job_id, progress),
            metadata=self._metadata,
        )
