"""What a child process does to itself before it works: it dies with its parent and keeps to its memory.

Standard library only: it is imported in children that shall start quickly.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, even by SIGKILL.

    The kernel means the *thread* that started this process: start children from one that lives as long as they shall.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        # It died before the call above, so no signal will come.
        os._exit(1)


def confine(parent_pid: int, memory_bytes: int) -> None:
    """For a process that decodes bytes of unknown origin."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A group of its own: a signal to the service's group must not end a decode half way, which would look like a
    # picture that kills its decoder.
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
