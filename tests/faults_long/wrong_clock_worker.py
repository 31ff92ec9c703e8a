"""The worker of the fault tests in a process whose clock `libfaketime` has set wrong.

It is for this process alone: its decode processes look at no clock. Waits are on the monotonic clock, which stays right; but
libfaketime 0.9.10 refuses those of `time.sleep` then, so they go another way.
"""

from __future__ import annotations

import os
import runpy
import select
import time

PRELOAD = "LD_PRELOAD"


def sleep(seconds: float) -> None:
    select.select([], [], [], seconds)


if __name__ == "__main__":
    os.environ.pop(PRELOAD)
    time.sleep = sleep  # type: ignore[assignment]  # integers come as floats, too
    runpy.run_module("tests.faults.worker", run_name="__main__", alter_sys=True)
