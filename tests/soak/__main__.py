"""`make soak MINUTES=30 PROFILE=embedded`: a constant rate of puts, overwrites and deletes, and a part killed every minute.
Never in the tests.

At the end the index must equal what was acknowledged to the client: nothing lost, nothing left over. Bounded in time and in
number, on loopback only; writes build/soak.json.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
import requests
from botocore.config import Config
from rich.console import Console
from rich.table import Table

from tests.benchmarks.report import machine
from tests.pictures import jpeg
from tests.stack import FullStack

RESULTS = Path("build/soak.json")
PROGRAMS = {
    "embedded": ("worker", "bridge", "serve", "kafka", "milvus", "weed"),
    "full": ("worker", "bridge", "serve", "kafka", "milvus", "minio", "mariadbd"),
}
CAPACITY_PUTS = 300
SHARE_OF_CAPACITY = 0.7
KILL_EVERY_SECONDS = 60.0
MOST_PUTS = 200_000
SETTLE_SECONDS = 600.0
FOLDER = "soak/"


@dataclass
class Run:
    stack: FullStack
    s3: Any
    bucket: str
    dice: random.Random
    programs: Sequence[str]
    live: dict[str, str] = field(default_factory=dict)
    """Key to ETag of what the store acknowledged last."""
    puts: int = 0
    deletes: int = 0
    refused: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    next_victims: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)

    def put(self, number: int, version: int) -> None:
        key = f"{FOLDER}{number:06}.jpg"
        data = jpeg(number * 7 + version, (160, 120))
        self.live[key] = self._until_acknowledged(lambda: self.s3.put_object(Bucket=self.bucket, Key=key, Body=data))["ETag"]
        self.puts += 1

    def delete(self, number: int) -> None:
        key = f"{FOLDER}{number:06}.jpg"
        self._until_acknowledged(lambda: self.s3.delete_object(Bucket=self.bucket, Key=key))
        self.live.pop(key, None)
        self.deletes += 1

    def _until_acknowledged(self, call: Any) -> Any:  # noqa: ANN401 - whatever boto3 answers
        while True:
            try:
                return call()
            except Exception:
                # The outcome is unknown: the same again, as any client does whose store was away for a moment.
                self.refused += 1
                time.sleep(0.2)

    def kill_one(self) -> None:
        """In rounds, each in an order of its own, so that no part is spared."""
        self.next_victims = self.next_victims or self.dice.sample(self.programs, len(self.programs))
        program = self.next_victims.pop()
        processes = self.stack.programs().get(program)
        if processes:
            processes[0].kill()
            self.kills[program] = self.kills.get(program, 0) + 1

    def waiting(self) -> float:
        """Events that no worker has committed; not a number while nobody answers."""
        try:
            status = requests.get(f"{self.stack.query_url}/v1/status", timeout=10).json()
            return float(status["lag"]["objects"]["pending"])
        except (requests.RequestException, KeyError):
            return math.nan

    def sample(self, minute: float) -> None:
        memory = sum(self.stack.resident_bytes().values()) / 2**20
        self.samples.append({"minute": round(minute, 1), "resident_mib": round(memory), "waiting": self.waiting()})


def capacity(run: Run) -> float:
    """Pictures a second from the first of some puts until the last is indexed."""
    started = time.monotonic()
    for number in range(CAPACITY_PUTS):
        run.put(900_000 + number, 0)
    while indexed(run) < CAPACITY_PUTS:
        time.sleep(0.1)
    return CAPACITY_PUTS / (time.monotonic() - started)


def indexed(run: Run) -> int:
    return int(requests.get(f"{run.stack.query_url}/v1/status", timeout=10).json()["images"]["indexed"])


def traffic(run: Run, rate: float, ends: float) -> None:
    """One put each tick; every tenth is followed by an overwrite, every other tenth by a delete."""
    number, next_tick = 0, time.monotonic()
    while time.monotonic() < ends and run.puts < MOST_PUTS:
        run.put(number, 0)
        if number % 10 == 3:
            run.put(number, 1)
        if number % 10 == 7:
            run.delete(number)
        number += 1
        next_tick += 1.2 / rate
        time.sleep(max(0.0, next_tick - time.monotonic()))


def indexed_now(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    parameters = {"prefix": FOLDER, "state": "indexed", "limit": "1000"}
    while True:
        page = requests.get(f"{run.stack.query_url}/v1/images", params=parameters, timeout=60).json()
        found |= {image["key"]: f'"{image["etag"]}"' for image in page["images"]}
        if not page["next"]:
            return found
        parameters["cursor"] = page["next"]


def catch_up(run: Run) -> float:
    """Seconds from the last put until nothing waits, with all that was killed last starting again meanwhile."""
    started = time.monotonic()
    while run.waiting() != 0 and time.monotonic() < started + SETTLE_SECONDS:
        time.sleep(1)
    return time.monotonic() - started


def settle(run: Run) -> dict[str, Any]:
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        run.stack.run("scan", check=False)
        report: dict[str, Any] = json.loads(run.stack.run("verify", "--json", check=False).stdout or "{}")
        if report.get("clean") or time.monotonic() > deadline:
            return report
        time.sleep(2)


def slope_mib_an_hour(samples: list[dict[str, float]]) -> float:
    """Least squares over the second half: the first half warms up."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    x, y = [one["minute"] for one in half], [one["resident_mib"] for one in half]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mean_x) ** 2 for value in x) or 1.0
    return 60 * sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def soak(stack: FullStack, profile: str, minutes: float, seed: int, console: Console) -> bool:
    variables = stack.variables()
    s3 = boto3.client(
        "s3",
        endpoint_url=variables["S3_ENDPOINT"],
        aws_access_key_id=variables["S3_ACCESS_KEY"],
        aws_secret_access_key=variables["S3_SECRET_KEY"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20),
    )
    run = Run(stack, s3, variables["S3_BUCKET"], random.Random(seed), PROGRAMS[profile])
    most = capacity(run)
    rate = SHARE_OF_CAPACITY * most
    console.print(f"capacity {most:.0f} pictures a second; {rate:.1f} a second for {minutes:g} minutes, seed {seed}")
    started = time.monotonic()
    ends = started + 60 * minutes
    client = threading.Thread(target=traffic, args=(run, rate, ends))
    client.start()
    while client.is_alive():
        client.join(KILL_EVERY_SECONDS)
        run.sample((time.monotonic() - started) / 60)
        if client.is_alive():
            run.kill_one()
        console.print(f"{run.puts} puts, {sum(run.kills.values())} kills, {run.samples[-1]}")
    caught_up = catch_up(run)
    report = settle(run)
    found = indexed_now(run)
    lost = [key for key, etag in run.live.items() if found.get(key) != etag]
    ghosts = [key for key in found if key not in run.live]
    figures = {
        "machine": machine(),
        "profile": profile,
        "minutes": minutes,
        "seed": seed,
        "rate_per_second": round(rate, 1),
        "puts": run.puts,
        "deletes": run.deletes,
        "answers_of_the_store_that_were_errors": run.refused,
        "kills": run.kills,
        "lost": len(lost),
        "ghosts": len(ghosts),
        "verify_clean": bool(report.get("clean")),
        "seconds_until_all_was_worked_on": round(caught_up),
        "most_events_waiting": max((one["waiting"] for one in run.samples if not math.isnan(one["waiting"])), default=math.nan),
        "resident_slope_mib_an_hour": round(slope_mib_an_hour(run.samples)),
        "samples": run.samples,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table("figure", "value")
    for name, value in figures.items():
        if name not in ("samples", "machine"):
            table.add_row(name, str(value))
    console.print(table)
    return not lost and not ghosts and bool(report.get("clean"))


def main() -> None:
    minutes, seed = float(os.environ.get("MINUTES", "30")), int(os.environ.get("SEED", "1"))
    profile = os.environ.get("PROFILE", "embedded")
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="image-search-soak-") as folder,
        FullStack.running(Path(folder), arguments=("--profile", profile)) as stack,
    ):
        psutil.Process().nice(5)  # the load generator must not starve what it measures
        good = soak(stack, profile, minutes, seed, console)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
