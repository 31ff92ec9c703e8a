"""What each service may do at each store: the files of infra/deploy/policies, which production uses too, for this stack."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.kafka.access import Grant

FOLDER = Path(__file__).parents[1] / "deploy" / "policies"
SERVICES = ("bridge", "worker", "query", "upgrade")
# The bucket that the files name; topics and groups stand there without a prefix.
_BUCKET = "arn:aws:s3:::images"


def object_store(user: str, buckets: Sequence[str]) -> dict[str, Any]:
    """The policy document, for these buckets."""
    policy: dict[str, Any] = json.loads((FOLDER / "minio" / f"{user}.json").read_text())
    for statement in policy["Statement"]:
        places = [place.removeprefix(_BUCKET) for place in statement["Resource"]]
        statement["Resource"] = [f"arn:aws:s3:::{bucket}{place}" for bucket in buckets for place in places]
    return policy


def broker(user: str, prefix: str) -> list[Grant]:
    return list(_grants((FOLDER / "kafka" / f"{user}.acl").read_text(), prefix))


def _grants(text: str, prefix: str) -> Iterator[Grant]:
    for line in text.splitlines():
        if line and not line.startswith("#"):
            resource, name, _, operation = shlex.split(line)
            yield Grant(resource.removeprefix("--"), prefix + name, operation)


def database(user: str) -> list[str]:
    """Statements, a line each."""
    lines = (FOLDER / "sql" / f"{user}.sql").read_text().splitlines()
    return [line for line in lines if not line.startswith("--")]


def vector_store(user: str) -> Mapping[str, Sequence[str]]:
    """Privileges by the kind of thing that they are for."""
    found: dict[str, list[str]] = json.loads((FOLDER / "milvus" / f"{user}.json").read_text())
    return found
