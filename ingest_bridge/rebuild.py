"""`image-search rebuild`: returns when the workers have done what a scan asked for, and the index is whole again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from infra.errors import TransientError
from infra.kafka.interface import Broker
from infra.retry import until_done
from schemas.topics import OBJECTS, PROCESSOR_GROUP

POLL_SECONDS = 0.5
STALLED_SECONDS = 300.0
"""Workers that commit nothing for this long are not there, or cannot work: their log says why."""


class WorkersStalled(TransientError):
    """Events wait, and no worker commits any. The message says how many."""


async def until_worked_off(
    broker: Broker,
    show: Callable[[int], None],
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Returns when everything written so far has been worked on; `show` hears how many events are left.

    Raises WorkersStalled. What is written meanwhile is not waited for.
    """
    ends = {partition: end for partition, (_, end) in (await until_done(lambda: broker.offsets(OBJECTS))).items()}
    least, since = sum(ends.values()) + 1, now()
    while True:
        lag = await until_done(lambda: broker.lag(OBJECTS, PROCESSOR_GROUP))
        left = sum(max(0, ends.get(one.partition, 0) - max(one.committed, one.begin)) for one in lag)
        show(left)
        if not left:
            return
        if left < least:
            least, since = left, now()
        elif now() - since > STALLED_SECONDS:
            raise WorkersStalled(f"{left} events are written and no worker has taken one for {STALLED_SECONDS:.0f} s")
        await sleep(POLL_SECONDS)
