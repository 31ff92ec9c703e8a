"""What hostile pictures do to the process that decodes them. Imported in decode processes, so it imports little."""

from __future__ import annotations

import os
import signal

from processors.raster import DecodeRules, Raster, Refusal, render

HANGS = b"hangs"
KILLS = b"kills"
EXITS = b"exits"


def render_or_misbehave(data: bytes, rules: DecodeRules) -> Raster | Refusal:
    if data == HANGS:
        signal.pause()
    if data == KILLS:
        os.kill(os.getpid(), signal.SIGKILL)
    if data == EXITS:
        os._exit(3)
    return render(data, rules)
