"""What a request is refused with, whatever went wrong: a stable code, words of our own, nothing of a library's text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import structlog
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from infra.errors import ImageRejected, ObjectChanged, PermanentError, StoreRefused, StoreUnavailable
from schemas.api import ErrorAnswer, ErrorCode, ErrorDetail

log = structlog.get_logger(__name__)

BUSY_RETRY_SECONDS = 1
STORE_RETRY_SECONDS = 5
_LONGEST_NAME = 64
_MOST_PROBLEMS = 20

# Where the library speaks of its own language's types.
_PLAIN_WORDS = {"tuple_type": "must be a list", "model_type": "must be an object", "extra_forbidden": "is not known here"}


class RequestRefused(PermanentError):
    """This request gets an error for an answer."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = dict(details or {})
        self.headers = dict(headers or {})
        if retry_after_seconds is not None:
            self.headers["Retry-After"] = str(retry_after_seconds)

    def answer(self, request_id: str) -> ErrorAnswer:
        return ErrorAnswer(error=ErrorDetail(code=self.code, message=self.message, details=self.details, request_id=request_id))


def too_busy(message: str, code: ErrorCode = ErrorCode.TOO_MANY_REQUESTS) -> RequestRefused:
    return RequestRefused(code, message, retry_after_seconds=BUSY_RETRY_SECONDS)


def invalid_parameters(error: ValidationError) -> RequestRefused:
    """One entry a problem. The value that was sent is not repeated: it may be long, or not for a log."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    entries = [
        {"parameter": _name(item), **_inside(item["loc"]), "problem": _words(item)} for item in problems[:_MOST_PROBLEMS]
    ]
    names = sorted({entry["parameter"] for entry in entries})
    code = ErrorCode.INVALID_FILTER if all(_is_of_filter(item) for item in problems) else ErrorCode.INVALID_REQUEST
    return RequestRefused(code, f"Not valid: {', '.join(names)}.", details={"parameters": entries})


def _name(problem: ErrorDetails) -> str:
    """`body` for what is wrong with all of it."""
    return str(problem["loc"][0])[:_LONGEST_NAME] if problem["loc"] else "body"


def _is_of_filter(problem: ErrorDetails) -> bool:
    """That a route knows no parameter of this name is another mistake."""
    return _name(problem) == "filter" and (problem["loc"], problem["type"]) != (("filter",), "extra_forbidden")


def _inside(location: tuple[str | int, ...]) -> dict[str, str]:
    """Where inside a parameter that has parts: `must.0.range.gte`. Behind a position the library names the kind of clause."""
    steps = [str(step)[:_LONGEST_NAME] for before, step in pairwise(location) if not isinstance(before, int)]
    return {"at": ".".join(steps)} if steps else {}


def _words(problem: ErrorDetails) -> str:
    return _PLAIN_WORDS.get(problem["type"], problem["msg"])


def refusal_of(error: Exception) -> RequestRefused:
    """Every error as a refusal. What nobody foresaw is logged whole and told to nobody outside."""
    match error:
        case RequestRefused():
            return error
        case ObjectChanged():
            return RequestRefused(
                ErrorCode.PRECONDITION_FAILED, "What is at this key is not what If-Match or If-None-Match asks for."
            )
        case ImageRejected():
            return RequestRefused(ErrorCode(error.reason.value), str(error))
        case StoreUnavailable():
            log.warning("store_unavailable", store=error.store, error=str(error))
            return RequestRefused(
                ErrorCode.STORE_UNAVAILABLE,
                f"{error.store} does not answer at the moment. Try again.",
                details={"store": error.store},
                retry_after_seconds=STORE_RETRY_SECONDS,
            )
        case StoreRefused():
            log.warning("store_refused", reason=error.reason, error=str(error))
            return RequestRefused(
                ErrorCode.STORE_REFUSED,
                "The object store refuses access to this bucket. Its operator has to look at the bucket and its credentials.",
                details={"reason": error.reason},
                retry_after_seconds=STORE_RETRY_SECONDS,
            )
        case _:
            log.error("request_failed", exc_info=error)
            return RequestRefused(
                ErrorCode.INTERNAL_ERROR, "Something went wrong here. The service's log has it under this request id."
            )
