"""What the watchdog looks at: whether anything happens at all."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from infra.errors import StoreUnavailable, TransientError
from infra.metrics import RETRIES

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Progress:
    """Counts everything that happens. Waiting for a store that is known to be down counts too: nothing is stuck then."""

    steps: int = 0

    def waited(self, error: TransientError, attempt: int) -> None:
        self.steps += 1
        RETRIES.labels(error.store if isinstance(error, StoreUnavailable) else "object store").inc()
        if attempt in (1, 5) or attempt % 50 == 0:
            log.warning("waiting", error=str(error), attempt=attempt)
