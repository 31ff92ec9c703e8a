"""A bucket that is added while everything runs is followed, with what it held before; taken away, it is followed no more."""

from __future__ import annotations

import time
from collections.abc import Callable

import requests

from tests.e2e.conftest import WAIT_SECONDS, Deployment
from tests.pictures import jpeg

BUCKET = "holiday-pictures"


def test_a_bucket_added_while_everything_runs(deployment: Deployment) -> None:
    held, put_later, put_in_the_end = (jpeg(70_000 + number, (160, 120)) for number in range(3))
    first = deployment.stack.run("buckets", "list").stdout.split()
    assert BUCKET not in first
    deployment.s3.create_bucket(Bucket=BUCKET)
    deployment.s3.put_object(Bucket=BUCKET, Key="held before.jpg", Body=held)
    assert deployment.stack.run("scan", "--bucket", BUCKET, check=False).returncode == 2  # it is not followed

    deployment.stack.run("buckets", "add", BUCKET)
    assert _announced(deployment) == (deployment.profile == "full")
    deployment.stack.run("scan", "--bucket", BUCKET)  # asked for before the bridge can know
    _until_found(deployment, held, "held before.jpg")
    deployment.s3.put_object(Bucket=BUCKET, Key="put later.jpg", Body=put_later)
    _until_found(deployment, put_later, "put later.jpg")
    deployment.s3.delete_object(Bucket=BUCKET, Key="held before.jpg")
    _until_gone(deployment, held)
    status = requests.get(f"{deployment.stack.query_url}/v1/status", timeout=WAIT_SECONDS).json()
    assert status["buckets"] == [*first, BUCKET]
    assert deployment.stack.run("verify").returncode == 0
    # What was followed before still is.
    deployment.search(put_later, wait_for=deployment.put("beside.jpg", put_later))

    deployment.stack.run("buckets", "remove", BUCKET)
    assert deployment.stack.run("buckets", "list").stdout.split() == first
    assert not _announced(deployment)
    assert deployment.stack.run("scan", "--bucket", BUCKET, check=False).returncode == 2
    _until_found(deployment, put_later, "put later.jpg")  # what is indexed stays
    deployment.search(put_in_the_end, wait_for=deployment.put("in the end.jpg", put_in_the_end))


def _announced(deployment: Deployment) -> bool:
    """Does the store announce this bucket's changes? SeaweedFS knows no rules: its log has all buckets."""
    if deployment.profile == "embedded":
        return False
    return bool(deployment.s3.get_bucket_notification_configuration(Bucket=BUCKET).get("QueueConfigurations"))


def _keys(deployment: Deployment, picture: bytes) -> set[str]:
    return {hit["key"] for hit in deployment.search(picture, bucket=BUCKET, min_score=99)}


def _until_found(deployment: Deployment, picture: bytes, key: str) -> None:
    _until(lambda: key in _keys(deployment, picture), f"{key} is not found")


def _until_gone(deployment: Deployment, picture: bytes) -> None:
    _until(lambda: not _keys(deployment, picture), "what was deleted is still found")


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 2 * WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)
