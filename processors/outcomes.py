"""From what was found out about an object to its row, and to what subscribers are told about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from infra.kafka.interface import Message
from infra.metadata_store.interface import ImageRow, RowWrite
from infra.object_store.interface import ObjectStat
from infra.tracing import Span, carried_by
from processors.work import MICROSECONDS, Failure, Finding, Gone, Ignored, Letter, Picture, Seen, Work
from schemas.events import (
    CONTENT_TYPE,
    Cause,
    Outcome,
    OutcomeEvent,
    OutcomeType,
    Timings,
    outcome_event,
)
from schemas.identity import ModelFingerprint
from schemas.tables import RowState
from schemas.topics import (
    HEADER_ATTEMPT,
    HEADER_ERROR,
    HEADER_OFFSET,
    HEADER_PARTITION,
    HEADER_REASON,
    HEADER_TOPIC,
)
from schemas.vectors import VectorRow

MESSAGE_LENGTH = 500

# What an outcome of each state is called when the object was not indexed before.
_TYPE_OF_STATE = {
    RowState.INDEXED: OutcomeType.INDEXED,
    RowState.FAILED: OutcomeType.FAILED,
    RowState.IGNORED: OutcomeType.IGNORED,
    RowState.DELETED: OutcomeType.DELETED,
}


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Makes rows with the outcomes that they owe."""

    deployment: str

    def write_for(
        self, work: Work, seen: Seen, finding: Finding, now: datetime, timings_ms: dict[str, float]
    ) -> RowWrite | None:
        """The write that this finding asks for; None for an object that is indexed and cannot be read just now."""
        row = self._row_for(work, seen, finding, _microseconds(now))
        if row is None:
            return None
        models = frozenset(finding.vectors) if isinstance(finding, Picture) else frozenset()
        if _nothing_new(seen.row, row) and (work.change.cause is not Cause.REPAIR or row.state is RowState.DELETED):
            # Nothing new for subscribers. The row is written all the same, because a write raises the fence: it proves that
            # the vector just written is the last one, and it stops a slower writer that read the object before it was gone.
            return RowWrite(replace(row, published_generation=row.generation), seen.generation, models)
        timings = _timings(work, finding, now, timings_ms)
        owed = self._owed(work, seen.row, row, finding, timings)
        return RowWrite(replace(row, owed_outcomes=owed), seen.generation, models)

    def _row_for(self, work: Work, seen: Seen, finding: Finding, now_us: int) -> ImageRow | None:
        base = ImageRow(
            ref=work.ref,
            state=RowState.DELETED,
            generation=seen.generation + 1,
            published_generation=seen.row.published_generation if seen.row else 0,
            attempt=work.change.attempt,
            created_at_us=seen.row.created_at_us if seen.row else now_us,
            updated_at_us=now_us,
        )
        if isinstance(finding, Picture):
            return _with_stat(
                replace(
                    base,
                    state=RowState.INDEXED,
                    content_hash=finding.content_hash,
                    md5=finding.md5,
                    format=finding.facts.format,
                    width=finding.facts.width,
                    height=finding.facts.height,
                ),
                finding.stat,
            )
        if isinstance(finding, Failure | Ignored):
            state = RowState.FAILED if isinstance(finding, Failure) else RowState.IGNORED
            content_hash = finding.content_hash if isinstance(finding, Failure) else None
            row = replace(
                base, state=state, reason=finding.reason, message=finding.message[:MESSAGE_LENGTH], content_hash=content_hash
            )
            return _with_stat(row, finding.stat)
        if isinstance(finding, Gone):
            return base
        if seen.row is not None and seen.row.state is RowState.INDEXED:
            return None  # a fault of the store takes nothing out of the index; the dead letter and the next scan remain
        return replace(base, state=RowState.FAILED, reason=finding.reason, message=finding.message[:MESSAGE_LENGTH])

    def _owed(
        self, work: Work, before: ImageRow | None, row: ImageRow, finding: Finding, timings: Timings
    ) -> tuple[OutcomeEvent, ...]:
        now = datetime.fromtimestamp(row.updated_at_us / MICROSECONDS, UTC)
        kind = _TYPE_OF_STATE[row.state]
        if row.state is RowState.INDEXED and before is not None and before.state is RowState.INDEXED:
            kind = OutcomeType.UPDATED
        data = Outcome(
            bucket=row.ref.bucket,
            key=row.ref.key,
            object_id=row.object_id.hex(),
            generation=row.generation,
            cause=work.change.cause,
            etag=row.etag,
            version=row.version,
            put_time=None if row.put_time_us is None else datetime.fromtimestamp(row.put_time_us / MICROSECONDS, UTC),
            size=row.size,
            content_hash=row.content_hash.hex() if row.content_hash else None,
            width=row.width,
            height=row.height,
            format=row.format,
            model=finding.model if isinstance(finding, Picture) else None,
            timings_ms=timings,
            reason=row.reason,
            message=row.message,
            attempt=row.attempt if row.state is RowState.FAILED else None,
        )
        outcomes = [outcome_event(kind, self.deployment, now, data)]
        if isinstance(finding, Picture) and finding.duplicate_of and not _same_content(before, row):
            copy = data.model_copy(update={"duplicate_of": finding.duplicate_of.hex()})
            outcomes.append(outcome_event(OutcomeType.DUPLICATE, self.deployment, now, copy))
        return tuple(outcomes)


def vector_row(work: Work, picture: Picture, model: ModelFingerprint) -> VectorRow:
    return VectorRow(
        object_id=work.object_id,
        vector=picture.vectors[model],
        ref=work.ref,
        content_hash=picture.content_hash,
        put_time_us=picture.stat.put_time_us,
        size=picture.stat.size,
        width=picture.facts.width,
        height=picture.facts.height,
        format=picture.facts.format,
    )


def outcome_message(outcome: OutcomeEvent, span: Span) -> Message:
    headers = {"content-type": CONTENT_TYPE, **carried_by(span)}
    return Message(key=outcome.data.ref.topic_key, value=outcome.to_json(), headers=headers)


def dead_letter(letter: Letter) -> Message:
    """The message as it came; what is known about it stands in the headers."""
    delivery = letter.delivery
    return Message(
        key=delivery.key,
        value=delivery.value,
        headers={
            HEADER_TOPIC: delivery.topic,
            HEADER_PARTITION: str(delivery.partition),
            HEADER_OFFSET: str(delivery.offset),
            HEADER_REASON: letter.reason,
            HEADER_ERROR: letter.error[:MESSAGE_LENGTH],
            HEADER_ATTEMPT: str(letter.attempt),
            **carried_by(delivery.span),
        },
    )


def _with_stat(row: ImageRow, stat: ObjectStat | None) -> ImageRow:
    if stat is None:
        return row
    return replace(row, etag=stat.etag, version=stat.version, put_time_us=stat.put_time_us, size=stat.size)


def _nothing_new(before: ImageRow | None, row: ImageRow) -> bool:
    if row.state is RowState.DELETED:
        return before is None or before.state is RowState.DELETED
    return before is not None and (
        (before.state, before.etag, before.put_time_us, before.content_hash, before.reason, before.attempt)
        == (row.state, row.etag, row.put_time_us, row.content_hash, row.reason, row.attempt)
    )


def _same_content(before: ImageRow | None, row: ImageRow) -> bool:
    return before is not None and before.state is RowState.INDEXED and before.content_hash == row.content_hash


def _timings(work: Work, finding: Finding, now: datetime, timings_ms: dict[str, float]) -> Timings:
    own = finding.timings_ms if isinstance(finding, Picture) else {}
    since_put = None
    if work.change.cause is Cause.NOTIFICATION:
        since_put = max(0.0, 1000 * (now - work.event_time).total_seconds())
    rounded = {name: round(value, 1) for name, value in {**timings_ms, **own}.items()}
    return Timings(**rounded, since_put=None if since_put is None else round(since_put, 1))


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * MICROSECONDS)
