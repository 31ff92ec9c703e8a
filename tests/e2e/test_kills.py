"""Promise: whatever part of a running stack is killed while pictures come and go, the index ends equal to the bucket.

Numbered objects, a tenth overwritten, a tenth deleted. Each kill is seen: another process of that name stands there afterwards.
"""

from __future__ import annotations

import json
import time

import pytest

from tests.e2e.conftest import Deployment
from tests.pictures import jpeg

OBJECTS = 40
SETTLE_SECONDS = 150.0
# Object store and database; SQLite is no process of its own.
STORES = {"embedded": ["weed"], "full": ["minio", "mariadbd"]}


def kill(deployment: Deployment, program: str) -> None:
    victim = deployment.stack.programs()[program][0]
    victim.kill()
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        present = deployment.stack.programs().get(program)
        if present and present[0] != victim:
            return
        time.sleep(0.2)
    raise TimeoutError(f"{program} was not started again")


def put_again(deployment: Deployment, key: str, data: bytes) -> None:
    """As a client does whose store may be away for a moment."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            deployment.put(key, data)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.parametrize("part", ["worker", "bridge", "milvus", "kafka", "stores"])
def test_a_killed_part_loses_nothing(deployment: Deployment, part: str) -> None:
    folder = f"kill-{part}"
    programs = STORES[deployment.profile] if part == "stores" else [part]
    for number in range(OBJECTS):
        put_again(deployment, f"{folder}/{number:03}.jpg", jpeg(20_000 + number, (120, 90)))
        if number == OBJECTS // 2:
            for program in programs:
                kill(deployment, program)
    for number in range(0, OBJECTS, 10):
        put_again(deployment, f"{folder}/{number:03}.jpg", jpeg(30_000 + number, (120, 90)))
        deployment.s3.delete_object(Bucket=deployment.bucket, Key=f"{folder}/{number + 5:03}.jpg")
    report = settled(deployment)
    assert report["clean"], report
    keys = {f"{folder}/{number:03}.jpg" for number in range(OBJECTS) if number % 10 != 5}
    assert deployment.list_keys(folder + "/") == keys


def settled(deployment: Deployment) -> dict[str, object]:
    """A scan, then verify until it is clean or the time is over: what a kill swallowed is found by the scan."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        deployment.stack.run("scan", check=False)
        report: dict[str, object] = json.loads(deployment.stack.run("verify", "--json", check=False).stdout or "{}")
        if report.get("clean") or time.monotonic() > deadline:
            return report
        time.sleep(1)
