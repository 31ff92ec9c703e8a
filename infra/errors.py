"""The one tree of errors. Adapters translate their library's errors into these where the library is called.

Transient: the same call may succeed later, so callers wait and try again. Permanent: it will not, so callers record it.
A message says what to do next and never carries a library's text to a person outside.
"""

from __future__ import annotations

from schemas.events import ReasonCode


class ImageSearchError(Exception):
    """Root of every error that this project raises on purpose."""


class TransientError(ImageSearchError):
    """Waiting may help."""


class StoreUnavailable(TransientError):
    """A store or the broker did not answer, or answered that it cannot now. `store` names it for people."""

    def __init__(self, store: str, detail: str) -> None:
        super().__init__(f"{store} is not available: {detail}")
        self.store = store


class StoreRefused(TransientError):
    """The store is well and refuses: the bucket is missing or access is denied.

    A fault, never a deletion: an object behind it may well exist (invariant 11).
    """

    def __init__(self, reason: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PermanentError(ImageSearchError):
    """Waiting does not help."""


class ObjectGone(PermanentError):
    """There is no object at this key: NoSuchKey or a delete marker, nothing else."""


class ObjectChanged(PermanentError):
    """What is at this key now is not what the writer made its write depend on."""


class ImageRejected(PermanentError):
    """The bytes are no picture that we index. `reason` is stable, the message is for people."""

    def __init__(self, reason: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InvalidEvent(PermanentError):
    """A message that is no event of ours."""

    def __init__(self, reason: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConfigurationError(PermanentError):
    """Settings, schema or model do not fit together. The message says what to change; the process does not start."""
