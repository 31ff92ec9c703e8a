"""Becomes another program that is told to stop when its supervisor dies. Standard library only: it runs before anything else.

    python launch.py SUPERVISOR_PID LIBRARY_PATH PROGRAM ARGUMENT...

The wish to be told (PR_SET_PDEATHSIG) belongs to the process and outlives exec, so it is made here and not between fork
and exec of the supervisor, where Python code may deadlock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    supervisor, library_path, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(supervisor):
        # It died before it could be watched: nobody is left to stop this program.
        sys.exit(1)
    if library_path:
        os.environ["LD_LIBRARY_PATH"] = library_path
    os.execvp(command[0], command)  # noqa: S606 - becoming the named program is the purpose


if __name__ == "__main__":
    main(sys.argv[1:])
