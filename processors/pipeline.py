"""The life of a batch, free of Faust. The numbered steps are those of ARCHITECTURE.md.

What a crash leaves behind, step by step (the broker then delivers the batch again):
  1-7  nothing was written, except dead letters of unparsable messages: written again, their identity tells.
  8    vectors that no row names yet: no query shows them (hits are checked against rows), the repeat overwrites them.
  9    rows that owe outcomes, and vectors that no row names any more: both are settled at the next look-up.
  10   outcomes may be there although the row still owes them: published again with the same ids.
  11   nothing: an offset that was not committed is delivered again and dropped as known.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol

import structlog

from infra.errors import ConfigurationError, ImageSearchError, InvalidEvent
from infra.metadata_store.interface import MetadataStore, ModelRow, RowWrite
from infra.metrics import (
    BATCH_EVENTS,
    EVENTS_KNOWN,
    EVENTS_READ,
    GENERATION_CONFLICTS,
    PUT_TO_ROW_SECONDS,
)
from infra.retry import Result, until_done
from infra.vector_store.interface import VectorStore
from processors.batch_trace import note_known, note_works, traced
from processors.findings import Finder
from processors.outcomes import RowMaker, vector_row
from processors.progress import Progress
from processors.publishing import Publisher
from processors.reading import Reader
from processors.steps import timed
from processors.vectors import Vectorizer
from processors.work import (
    Delivery,
    Failure,
    Finding,
    Gone,
    IsOurs,
    Letter,
    PartitionsRevoked,
    Picture,
    Planned,
    Seen,
    Work,
    collapse,
    is_known,
    names_of,
    parse,
)
from schemas.events import Cause, ReasonCode
from schemas.identity import ModelFingerprint, ObjectId
from schemas.tables import KEPT_STATES, RowState

log = structlog.get_logger(__name__)

AfterStep = Callable[[int], Awaitable[None]]
"""Called after each numbered step with its number: the fault tests kill the process here."""

INTERNAL_ATTEMPTS = 3
UNKNOWN_SIZE_BYTES = 1024 * 1024


class ModelsInUse(Protocol):
    """Which models' collections are kept equal to the bucket just now. It may change from batch to batch."""

    def in_use(self) -> AbstractAsyncContextManager[Sequence[Vectorizer]]:
        """The active model first. They stay open until the context is left."""


async def _go_on(_step: int) -> None:
    return None


def _for_ever() -> bool:
    return True


class Pipeline:
    """Works a batch until nothing of it is left. Never raises for one object; a store that is down makes it wait."""

    def __init__(
        self,
        *,
        reader: Reader,
        models: ModelsInUse,
        metadata: MetadataStore,
        vectors: VectorStore,
        publisher: Publisher,
        rows: RowMaker,
        batch_bytes: int,
        progress: Progress,
        after_step: AfterStep = _go_on,
    ) -> None:
        self._reader, self._models = reader, models
        self._metadata, self._vectors = metadata, vectors
        self._finder = Finder(metadata, on_wait=progress.waited, done=self._done)
        self._publisher, self._rows, self._batch_bytes = publisher, rows, batch_bytes
        self._progress, self._after_step = progress, after_step

    async def process(self, deliveries: Sequence[Delivery], is_ours: IsOurs = _for_ever) -> None:
        """Returns when every delivery may be acknowledged.

        Raises PartitionsRevoked between steps, up to the first write, when they are not ours any more. From there on the
        batch goes on to its end: the fence makes a late write harmless, and half a write would only be mended later.
        """
        BATCH_EVENTS.observe(len(deliveries))
        with traced(deliveries) as traced_deliveries:
            parsed = await self._parse(traced_deliveries)
            with timed(2, "collapse"):
                works = collapse(parsed)
            note_works(parsed, works)
            await self._done(2)
            for group in _by_bytes(works, self._batch_bytes):
                await self._process_or_isolate(group, is_ours)

    async def _process_or_isolate(self, works: Sequence[Work], is_ours: IsOurs) -> None:
        """One object that meets a bug of ours must not stop the others: it is worked on alone, then put aside."""
        try:
            await self._until_settled(works, is_ours)
        except ImageSearchError:
            raise
        except Exception:
            log.exception("batch failed, its objects are worked on one by one", objects=len(works))
            for work in works:
                await self._alone(work)

    async def _alone(self, work: Work) -> None:
        for attempt in range(1, INTERNAL_ATTEMPTS + 1):
            try:
                # It may have written before it met the bug, so it goes on whoever the object belongs to by now.
                return await self._until_settled([work.again()], _for_ever)
            except ImageSearchError:
                raise
            except Exception:
                log.exception("object failed", **names_of(work.delivery, work.object_id), attempt=attempt)
        await self._put_aside(work)
        return None

    async def _put_aside(self, work: Work) -> None:
        failure = Failure(ReasonCode.INTERNAL_ERROR, "an error of ours: the worker's log has it under this key", None)
        try:
            seen = (await self._look_up([work]))[work.object_id]
            async with self._models.in_use() as models:
                await self._write_and_tell([(work, seen, failure)], {}, models)
        except ImageSearchError:
            raise
        except Exception:
            log.exception("object cannot even be recorded as failed", **names_of(work.delivery, work.object_id))
            letter = Letter(work.delivery, failure.reason, failure.message, object_id=work.object_id)
            await self._publisher.put_aside([letter])

    async def _until_settled(self, works: Sequence[Work], is_ours: IsOurs) -> None:
        works = await self._round(works, is_ours)
        while works:
            # They lost against another writer after a write of their own, which must be put right whoever they belong to.
            works = await self._round(works, _for_ever)

    async def _round(self, works: Sequence[Work], is_ours: IsOurs) -> list[Work]:
        """Steps 3 to 10. Returns the objects that another writer moved on meanwhile: to be worked on again."""
        _require(is_ours)
        async with self._models.in_use() as models:
            return await self._round_for(models, works, is_ours)

    async def _round_for(self, models: Sequence[Vectorizer], works: Sequence[Work], is_ours: IsOurs) -> list[Work]:
        started = time.time()
        kept = [one.model.fingerprint for one in models]
        with timed(3, "look up"):
            seen = await self._look_up(works)
            moved_on = await self._settle(works, seen, models)
            todo = [work for work in works if work.object_id not in moved_on and not _is_known(work, seen, kept)]
        await self._done(3)
        _require(is_ours)
        if not todo:
            return [work.again() for work in works if work.object_id in moved_on]

        queued_ms = 1000 * max(0.0, started - min(work.delivery.time_ms for work in todo) / 1000)
        with timed(4, "read") as reading:
            reads = await self._reader.read_all(todo)
        timings = {"queued": queued_ms, "read": 1000 * reading.seconds / len(todo)}
        await self._done(4)
        _require(is_ours)
        findings = await self._finder.find(todo, reads, models)
        _require(is_ours)
        found = [(work, seen[work.object_id], finding) for work, finding in zip(todo, findings, strict=True)]
        moved_on |= await self._write_and_tell(found, timings, models)
        return [work.again() for work in works if work.object_id in moved_on]

    # -- step 1 ------------------------------------------------------------------------------------------------------
    async def _parse(self, deliveries: Sequence[Delivery]) -> list[Work]:
        works: list[Work] = []
        bad: list[Letter] = []
        with timed(1, "parse"):
            for delivery in deliveries:
                try:
                    work = parse(delivery)
                except InvalidEvent as error:
                    bad.append(Letter(delivery, error.reason, str(error)))
                else:
                    EVENTS_READ.labels(work.change.cause).inc()
                    works.append(work)
            await self._publisher.put_aside(bad)
        await self._done(1)
        return works

    # -- step 3 ------------------------------------------------------------------------------------------------------
    async def _look_up(self, works: Sequence[Work]) -> dict[ObjectId, Seen]:
        ids = [work.object_id for work in works]
        rows = await self._wait(lambda: self._metadata.rows(ids))
        models = await self._wait(lambda: self._metadata.models_of(ids)) if rows else {}
        return {object_id: Seen(rows.get(object_id), models.get(object_id, {})) for object_id in ids}

    async def _settle(self, works: Sequence[Work], seen: dict[ObjectId, Seen], models: Sequence[Vectorizer]) -> set[ObjectId]:
        """Pay what rows still owe since a crash, before anything is decided on them: a write that followed would
        otherwise take the owed outcome's place, and subscribers would never hear of it."""
        owing = [(work, row) for work in works if (row := seen[work.object_id].row) is not None and not row.is_published]
        if not owing:
            return set()
        planned = [
            Planned(work, _finding_of(row.state, row.reason, row.message), RowWrite(row, row.generation - 1))
            for work, row in owing
        ]
        moved_on = await self._remove_vectors(planned, models)
        await self._publisher.publish([one for one in planned if one.work.object_id not in moved_on])
        for work, row in owing:
            seen[work.object_id] = Seen(row.with_published(), seen[work.object_id].models)
        return moved_on

    # -- steps 8 to 10 -----------------------------------------------------------------------------------------------
    async def _write_and_tell(
        self, found: Sequence[tuple[Work, Seen, Finding]], timings_ms: dict[str, float], models: Sequence[Vectorizer]
    ) -> set[ObjectId]:
        """Returns the objects that another writer had moved on."""
        write_started = time.perf_counter()
        with timed(8, "vectors"):
            pictures = [(work, finding) for work, _, finding in found if isinstance(finding, Picture)]
            for model in (one.model for one in models):
                rows = [vector_row(*one, model.fingerprint) for one in pictures if model.fingerprint in one[1].vectors]
                if rows:
                    await self._in_collection(model, partial(self._vectors.upsert, model.collection, rows))
        await self._done(8)
        now = datetime.now(UTC)
        timings = {**timings_ms, "write": 1000 * (time.perf_counter() - write_started) / max(1, len(found))}
        planned = [
            # A microsecond apart in the order of their events, so that `oldest first` has one answer within a batch too.
            Planned(work, finding, self._rows.write_for(work, seen, finding, now + timedelta(microseconds=place), timings))
            for place, (work, seen, finding) in enumerate(found)
        ]
        with timed(9, "rows"):
            writes = [one.write for one in planned if one.write is not None]
            lost = await self._wait(lambda: self._metadata.write(writes)) if writes else set()
            GENERATION_CONFLICTS.inc(len(lost))
            written = [one for one in planned if one.work.object_id not in lost]
            _count_since_put(written)
            lost |= await self._remove_vectors(written, models)
        await self._done(9)
        with timed(10, "outcomes"):
            await self._publisher.publish([one for one in written if one.work.object_id not in lost])
        await self._done(10)
        return lost

    async def _remove_vectors(self, planned: Sequence[Planned], models: Sequence[Vectorizer]) -> set[ObjectId]:
        """Remove the vectors of what is no longer indexed, after its row said so. Returns whom another writer overtook.

        The generation is read again afterwards: a writer that indexed the object in between has had its vector removed by
        us, so the object is worked on once more and never dropped as known.
        """
        expected: dict[ObjectId, int] = {}
        for one in planned:
            if one.write is not None and one.write.row.state is not RowState.INDEXED:
                expected[one.work.object_id] = one.write.row.generation
        if not expected:
            return set()
        for model in (one.model for one in models):
            await self._in_collection(model, partial(self._vectors.delete, model.collection, list(expected)))
        rows = await self._wait(lambda: self._metadata.rows(list(expected)))
        return {
            object_id
            for object_id, generation in expected.items()
            if (rows[object_id].generation if object_id in rows else 0) != generation
        }

    async def _in_collection(self, model: ModelRow, write: Callable[[], Awaitable[None]]) -> None:
        """A model may be dropped in the middle of a batch, and its collection with it: nothing is owed to it then."""
        try:
            await self._wait(write)
        except ConfigurationError:
            if model.fingerprint in {row.fingerprint for row in await self._wait(partial(self._metadata.models, KEPT_STATES))}:
                raise

    # -- shared ------------------------------------------------------------------------------------------------------
    async def _wait(self, call: Callable[[], Awaitable[Result]]) -> Result:
        return await until_done(call, on_wait=self._progress.waited)

    async def _done(self, step: int) -> None:
        self._progress.steps += 1
        await self._after_step(step)


def _count_since_put(written: Sequence[Planned]) -> None:
    """Vector and row are there: from now on a search finds it, as soon as the vector store shows what it has acknowledged."""
    now = datetime.now(UTC)
    for one in written:
        if one.write is None or not one.write.row.owed_outcomes or one.write.row.state is not RowState.INDEXED:
            continue
        if one.work.change.cause is Cause.NOTIFICATION:
            PUT_TO_ROW_SECONDS.observe(max(0.0, (now - one.work.event_time).total_seconds()))


def _is_known(work: Work, seen: dict[ObjectId, Seen], models: Sequence[ModelFingerprint]) -> bool:
    known = is_known(work, seen[work.object_id], models)
    if known:
        EVENTS_KNOWN.inc()
        note_known(work)
    return known


def _require(is_ours: IsOurs) -> None:
    if not is_ours():
        raise PartitionsRevoked("the partitions of this batch were taken away")


def _finding_of(state: RowState, reason: ReasonCode | None, message: str | None) -> Finding:
    """The finding that a stored row stands for: a failed one still owes its dead letter."""
    if state is RowState.FAILED:
        return Failure(reason or ReasonCode.INTERNAL_ERROR, message or "", None)
    return Gone()


def _by_bytes(works: Sequence[Work], limit: int) -> Iterator[list[Work]]:
    """Groups whose objects together stay within the limit, by the sizes that their events announced."""
    group: list[Work] = []
    held = 0
    for work in works:
        size = UNKNOWN_SIZE_BYTES if work.change.size is None else work.change.size
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(work)
        held += size
    if group:
        yield group
