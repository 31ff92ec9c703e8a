"""How far a scan is, and how it may end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from infra.errors import PermanentError


class ScanPhase(StrEnum):
    QUEUED = "queued"
    LISTING = "listing"
    COMPARING = "comparing"
    REMOVING = "removing"
    PUBLISHING = "publishing"
    VECTORS = "vectors"
    DONE = "done"


class ScanProgress(BaseModel):
    """How far a scan is: the progress of its job. All but the phase counts objects."""

    model_config = ConfigDict(extra="ignore")

    phase: ScanPhase = ScanPhase.QUEUED
    listed: int = 0
    compared: int = 0
    written: int = 0
    removed: int = 0
    unnameable: int = 0
    """Objects whose key no event can carry (longer than 1,024 bytes): the log names them."""
    last_key: str | None = None
    checked: int = 0
    """Vectors and indexed rows that were held against each other, of `to_check`."""
    to_check: int = 0
    repairs: int = 0
    """Events for vectors that are missing, wrong, or of nothing that is indexed."""
    waiting_for_workers: bool = False
    eta_seconds: float | None = None


class ScanFailed(PermanentError):
    """The scan could not go on; nothing was removed unless it said so before. Another one may succeed."""


class RemovalStopped(PermanentError):
    """The scan would have removed too many objects. Nothing was removed. The message has the numbers and what to do."""


@dataclass(frozen=True, slots=True)
class RemovalGuard:
    """A scan that would remove more objects than `limit` and more than `share` of the rows stops (invariant 11)."""

    limit: int
    share: float

    def forbids(self, removals: int, rows: int) -> bool:
        return removals > self.limit and removals > self.share * rows
