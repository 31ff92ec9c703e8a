"""`make bench`: all arms of each measure in one run on one machine, raw rounds kept. Never part of the tests.

python -m tests.benchmarks [--only NAME,NAME] [--quick] [--rows N]
python -m tests.benchmarks --gpu [--quick]
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Sequence
from typing import Final

from rich.console import Console

from tests.benchmarks import decoding, gpu, index, instead, models, pipeline, services
from tests.benchmarks.parts import Part, Run
from tests.benchmarks.report import Result, publish

PARTS: Final = (
    Part("decode", "decoding against simplejpeg and against Pillow, and what the processes around it cost", decoding.measure),
    Part("model", "the bare model against a plain loop in torch", models.measure),
    Part("services", "freshness, backlog, searches and memory of the embedded profile", services.embedded_profile),
    Part("full", "freshness of the full profile", services.full_profile),
    Part("pipeline", "a backlog and searches against the bare model, ResNet50's shape in each precision", pipeline.part),
    Part("index", "recall, and searches against bare pymilvus, on growing and on sealed data", index.part),
    Part("instead", "what people would use instead: the older project's shape and the tutorial loop", instead.part),
)


def asked(only: str) -> Sequence[Part]:
    """Raises SystemExit that lists the parts when one is asked for that there is not."""
    names = [name for name in only.split(",") if name]
    if unknown := set(names) - {part.name for part in PARTS}:
        known = "\n".join(f"  {part.name:10} {part.about}" for part in PARTS)
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; choose of\n{known}")
    return [part for part in PARTS if not names or part.name in names]


def measured(parts: Sequence[Part], run: Run) -> tuple[list[Result], list[str]]:
    """The results, and the names of the parts that failed: an hour of measuring is not lost with one of them."""
    results: list[Result] = []
    failed: list[str] = []
    for part in parts:
        run.say(f"[bold]{part.name}[/bold]: {part.about}")
        try:
            results += part.measure(run)
        except Exception:
            failed.append(part.name)
            run.console.print(traceback.format_exc(), markup=False)
    return results, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parts to run, of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: whether it works, not how fast it is")
    parser.add_argument("--rows", type=int, default=0, help=f"vectors of the index part (default {index.ROWS:,})")
    parser.add_argument("--gpu", action="store_true", help="nothing but an NVIDIA GPU, with a table of its own")
    arguments = parser.parse_args()
    run = Run(Console(), arguments.quick, arguments.rows)
    if arguments.gpu:
        gpu.measure(run)
        return
    load = os.getloadavg()[0]
    results, failed = measured(asked(arguments.only), run)
    publish(results, run.cpu_seconds, run.console, failed=failed, quick=run.quick, load=load)
    if failed:
        raise SystemExit(f"failed, and missing above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
