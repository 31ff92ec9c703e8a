"""Promise: a scan beside live traffic never takes a live picture out of the index (invariants 1, 2 and 11)."""

from __future__ import annotations

import json
import subprocess
import threading

import pytest

from tests.e2e.conftest import Deployment
from tests.e2e.test_kills import settled
from tests.pictures import jpeg

OBJECTS = 120
FOLDER = "under-scan"


@pytest.mark.timeout(400)
def test_scans_beside_puts_overwrites_and_deletes(deployment: Deployment) -> None:
    done = threading.Event()
    scans: list[subprocess.CompletedProcess[str]] = []

    def scan_again_and_again() -> None:
        while not done.is_set():
            scans.append(deployment.stack.run("scan", "--prefix", f"{FOLDER}/", "--json", check=False))

    scanning = threading.Thread(target=scan_again_and_again)
    scanning.start()
    try:
        for number in range(OBJECTS):
            key = f"{FOLDER}/{number:03}.jpg"
            deployment.put(key, jpeg(40_000 + number, (120, 90)))
            if number % 10 == 3:
                deployment.put(key, jpeg(50_000 + number, (120, 90)))
            if number % 10 == 7:
                deployment.delete(key)
    finally:
        done.set()
        scanning.join()
    assert all(scan.returncode == 0 for scan in scans), [scan.stderr for scan in scans if scan.returncode]
    assert settled(deployment)["clean"]
    live = {f"{FOLDER}/{number:03}.jpg" for number in range(OBJECTS) if number % 10 != 7}
    assert deployment.list_keys(f"{FOLDER}/") == live
    lines = deployment.stack.run("events", "--json", "--type", "deleted", "--prefix", f"{FOLDER}/").stdout.splitlines()
    assert {json.loads(line)["event"]["data"]["key"] for line in lines}.isdisjoint(live)
