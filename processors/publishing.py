"""Step 10: outcomes and dead letters on their topics, then the note in the row that they are out."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from infra.kafka.interface import Message, Producer
from infra.metadata_store.interface import MetadataStore
from infra.metrics import DEAD_LETTERS, OUTCOMES, PUT_TO_ROW_SECONDS
from infra.retry import until_done
from processors.outcomes import dead_letter, outcome_message
from processors.progress import Progress
from processors.work import Failure, Planned, Unreachable
from schemas.events import OutcomeEvent
from schemas.topics import DEAD_LETTERS as DEAD_LETTER_TOPIC
from schemas.topics import HEADER_OFFSET, HEADER_PARTITION, HEADER_REASON
from schemas.topics import OUTCOMES as OUTCOME_TOPIC

log = structlog.get_logger(__name__)


class Publisher:
    """Waits for the broker as long as it takes. Sending twice does no harm: ids and identities repeat."""

    def __init__(self, producer: Producer, metadata: MetadataStore, progress: Progress) -> None:
        self._producer, self._metadata, self._progress = producer, metadata, progress

    async def put_aside(self, letters: Sequence[Message]) -> None:
        for letter in letters:
            DEAD_LETTERS.labels(letter.headers[HEADER_REASON]).inc()
            log.warning(
                "dead letter",
                reason=letter.headers[HEADER_REASON],
                key=letter.key.decode("utf-8", "replace"),
                partition=letter.headers[HEADER_PARTITION],
                offset=letter.headers[HEADER_OFFSET],
            )
        if letters:
            await until_done(lambda: self._producer.send(DEAD_LETTER_TOPIC, letters), on_wait=self._progress.waited)

    async def publish(self, planned: Sequence[Planned]) -> None:
        """Dead letters first: once a row is noted as published, nothing would make up for a missing one."""
        await self.put_aside(
            [
                dead_letter(one.work.delivery, one.finding.reason, one.finding.message, one.work.change.attempt)
                for one in planned
                if isinstance(one.finding, Failure | Unreachable)
            ]
        )
        outcomes = [outcome for one in planned if one.write for outcome in one.write.row.owed_outcomes]
        if not outcomes:
            return
        messages = [outcome_message(outcome) for outcome in outcomes]
        await until_done(lambda: self._producer.send(OUTCOME_TOPIC, messages), on_wait=self._progress.waited)
        published = {
            one.work.object_id: one.write.row.generation for one in planned if one.write and one.write.row.owed_outcomes
        }
        await until_done(lambda: self._metadata.mark_published(published), on_wait=self._progress.waited)
        for outcome in outcomes:
            _count(outcome)


def _count(outcome: OutcomeEvent) -> None:
    OUTCOMES.labels(outcome.type, outcome.data.reason or "").inc()
    if outcome.data.timings_ms and outcome.data.timings_ms.since_put is not None:
        PUT_TO_ROW_SECONDS.observe(outcome.data.timings_ms.since_put / 1000)
