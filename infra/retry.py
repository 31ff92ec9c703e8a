"""Waiting for what may come back. One policy for every store: jittered, capped, and testable without sleeping."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from infra.errors import TransientError

Result = TypeVar("Result")

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 5.0


async def until_done(
    call: Callable[[], Awaitable[Result]],
    *,
    on_wait: Callable[[TransientError, int], None] | None = None,
    give_up_after_seconds: float | None = None,
) -> Result:
    """Call until it returns or fails for good. Transient errors are waited out: for ever, or until the given time is over.

    `on_wait` hears each failure and its number before the wait: a worker counts it as progress, so that its watchdog does
    not end a process that is rightly waiting for a store known to be down.
    """

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if on_wait is not None and isinstance(error, TransientError):
            on_wait(error, state.attempt_number)

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
        stop=tenacity.stop_never if give_up_after_seconds is None else tenacity.stop_after_delay(give_up_after_seconds),
        before_sleep=before_sleep,
        reraise=True,
    )

    async def attempt() -> Result:
        # tenacity awaits only what it can tell to be a coroutine function, which a lambda is not.
        return await call()

    return await retrying(attempt)
