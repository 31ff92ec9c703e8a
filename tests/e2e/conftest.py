"""One whole stack of each profile for all end-to-end tests, and an S3 client that nobody here wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.config import Config

from schemas.identity import ObjectRef
from tests.conftest import require_full_servers
from tests.stack import FullStack

WAIT_SECONDS = 30


@dataclass(frozen=True)
class Deployment:
    """What a developer has who was given the stack's environment file: an S3 client and an address."""

    profile: str
    stack: FullStack
    s3: Any  # boto3 makes its clients at run time and has no types
    bucket: str

    def put(self, key: str, data: bytes, **options: Any) -> str:
        """Put, and return the token that `wait_for` takes."""
        etag = self.s3.put_object(Bucket=self.bucket, Key=key, Body=data, **options)["ETag"].strip('"')
        return f"{self.id_of(key)}:{etag}"

    def delete(self, key: str) -> str:
        self.s3.delete_object(Bucket=self.bucket, Key=key)
        return f"{self.id_of(key)}:deleted"

    def id_of(self, key: str) -> str:
        return ObjectRef(self.bucket, key).object_id.hex()

    def search(self, picture: bytes, *, wait_for: str | None = None, **parameters: Any) -> list[dict[str, Any]]:
        query = {"limit": 5, **parameters, **({"wait_for": wait_for} if wait_for else {})}
        answer = requests.post(f"{self.stack.query_url}/v1/search", params=query, files={"file": picture}, timeout=WAIT_SECONDS)
        assert answer.status_code == 200, answer.text
        hits: list[dict[str, Any]] = answer.json()["hits"]
        return hits

    def image(self, key: str, *, wait_for: str | None = None) -> requests.Response:
        parameters = {"wait_for": wait_for} if wait_for else {}
        return requests.get(f"{self.stack.query_url}/v1/images/{self.id_of(key)}", params=parameters, timeout=WAIT_SECONDS)

    def list_keys(self, prefix: str) -> set[str]:
        """Keys of all indexed images below this prefix, page by page."""
        found: set[str] = set()
        parameters = {"prefix": prefix, "state": "indexed", "limit": "100"}
        while True:
            page = requests.get(f"{self.stack.query_url}/v1/images", params=parameters, timeout=WAIT_SECONDS).json()
            found |= {image["key"] for image in page["images"]}
            if not page["next"]:
                return found
            parameters["cursor"] = page["next"]


@contextmanager
def deployed(folder: Path, profile: str = "embedded", **variables: str) -> Iterator[Deployment]:
    """A stack of one's own, with these settings."""
    with FullStack.running(folder, arguments=("--profile", profile), **variables) as stack:
        given = stack.variables()
        s3 = boto3.client(
            "s3",
            endpoint_url=given["S3_ENDPOINT"],
            aws_access_key_id=given["S3_ACCESS_KEY"],
            aws_secret_access_key=given["S3_SECRET_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        yield Deployment(profile, stack, s3, given["S3_BUCKET"])
        s3.close()


@pytest.fixture(scope="session", params=["embedded", "full"])
def deployment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    profile: str = request.param
    if profile == "full":
        require_full_servers()
    with deployed(tmp_path_factory.mktemp("stack"), profile) as deployment:
        yield deployment
