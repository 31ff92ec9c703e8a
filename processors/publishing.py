"""Step 10: outcomes and dead letters on their topics, then the note in the row that they are out."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from infra.kafka.interface import Producer
from infra.metadata_store.interface import MetadataStore
from infra.metrics import DEAD_LETTERS, OUTCOMES
from infra.retry import until_done
from processors.batch_trace import note_outcome
from processors.outcomes import dead_letter, outcome_message
from processors.progress import Progress
from processors.work import Failure, Letter, Planned, Unreachable, names_of
from schemas.topics import DEAD_LETTERS as DEAD_LETTER_TOPIC
from schemas.topics import OUTCOMES as OUTCOME_TOPIC

log = structlog.get_logger(__name__)


class Publisher:
    """Waits for the broker as long as it takes. Sending twice does no harm: ids and identities repeat."""

    def __init__(self, producer: Producer, metadata: MetadataStore, progress: Progress) -> None:
        self._producer, self._metadata, self._progress = producer, metadata, progress

    async def put_aside(self, letters: Sequence[Letter]) -> None:
        for letter in letters:
            DEAD_LETTERS.labels(letter.reason).inc()
            delivery = letter.delivery
            log.warning(
                "dead letter",
                reason=letter.reason,
                partition=delivery.partition,
                offset=delivery.offset,
                **names_of(delivery, letter.object_id),
            )
        if letters:
            messages = [dead_letter(letter) for letter in letters]
            await until_done(lambda: self._producer.send(DEAD_LETTER_TOPIC, messages), on_wait=self._progress.waited)

    async def publish(self, planned: Sequence[Planned]) -> None:
        """Dead letters first: once a row is noted as published, nothing would make up for a missing one."""
        await self.put_aside(
            [
                Letter(one.work.delivery, one.finding.reason, one.finding.message, one.work.change.attempt, one.work.object_id)
                for one in planned
                if isinstance(one.finding, Failure | Unreachable)
            ]
        )
        owed = [(one, outcome) for one in planned if one.write for outcome in one.write.row.owed_outcomes]
        if not owed:
            return
        messages = [outcome_message(outcome, one.work.delivery.span) for one, outcome in owed]
        await until_done(lambda: self._producer.send(OUTCOME_TOPIC, messages), on_wait=self._progress.waited)
        published = {one.work.object_id: outcome.data.generation for one, outcome in owed}
        await until_done(lambda: self._metadata.mark_published(published), on_wait=self._progress.waited)
        for one, outcome in owed:
            OUTCOMES.labels(outcome.type, outcome.data.reason or "").inc()
            note_outcome(one.work.delivery, outcome)
