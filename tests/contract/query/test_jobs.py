"""Failures, jobs and models over HTTP: what is asked for is what the bridge and the workers find in the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infra.metadata_store.interface import Job
from schemas.access import Scope
from schemas.api import ErrorCode
from schemas.events import ReasonCode
from schemas.identity import ModelFingerprint, ObjectRef
from schemas.jobs import ReindexArguments, RetryArguments, ScanArguments
from schemas.tables import JobKind, JobState, ModelState, RowState
from tests.contract.query.test_keys import key_for
from tests.query_http import Client, refused, running
from tests.query_world import BUCKET, FINGERPRINT, QueryWorld, active, picture

OTHER = ModelFingerprint("b" * 64)


async def fail(world: QueryWorld, key: str, reason: ReasonCode, *, bucket: str = BUCKET) -> str:
    row = await world.set_row(ObjectRef(bucket, key), picture(1), state=RowState.FAILED, reason=reason)
    return row.object_id.hex()


async def job_of(world: QueryWorld, answer: dict[str, Any]) -> Job:
    job = await world.metadata.job(answer["job_id"])
    assert job is not None
    return job


async def test_failures_are_listed_by_reason(world: QueryWorld, client: Client) -> None:
    await world.put("good", 1)
    await fail(world, "a/one", ReasonCode.CORRUPT_IMAGE)
    await fail(world, "a/two", ReasonCode.DECODE_TIMEOUT)
    await fail(world, "b/three", ReasonCode.CORRUPT_IMAGE)
    page = await (await client.get("/v1/failures?limit=2")).json()
    assert [one["key"] for one in page["failures"]] == ["a/one", "a/two"]
    assert page["by_reason"] == {"CORRUPT_IMAGE": 2, "DECODE_TIMEOUT": 1}
    rest = await (await client.get("/v1/failures", params={"limit": "2", "cursor": page["next"]})).json()
    assert ([one["key"] for one in rest["failures"]], rest["next"]) == (["b/three"], None)
    some = await (await client.get("/v1/failures?reason=CORRUPT_IMAGE&prefix=b/")).json()
    assert [one["key"] for one in some["failures"]] == ["b/three"]
    assert some["by_reason"] == {"CORRUPT_IMAGE": 1}
    await refused(await client.get("/v1/failures?reason=UNKNOWN"), ErrorCode.INVALID_REQUEST)


async def test_a_retry_is_a_job_and_asked_for_twice_it_is_one(world: QueryWorld, client: Client) -> None:
    response = await client.post("/v1/failures/retry", json={"reason": "CORRUPT_IMAGE", "prefix": "a/"})
    assert response.status == 202
    answer = await response.json()
    job = await job_of(world, answer)
    assert (job.kind, job.state) == (JobKind.RETRY, JobState.QUEUED)
    arguments = RetryArguments.model_validate(job.arguments)
    assert arguments.reason is ReasonCode.CORRUPT_IMAGE
    assert [(place.bucket, place.prefix) for place in arguments.places] == [(BUCKET, "a/")]
    again = await (await client.post("/v1/failures/retry", json={"reason": "CORRUPT_IMAGE", "prefix": "a/"})).json()
    assert again["job_id"] == answer["job_id"]
    assert (await (await client.get(f"/v1/jobs/{answer['job_id']}")).json())["state"] == "queued"


@pytest.mark.parametrize(
    "body",
    [{}, {"all": False}, {"all": True, "reason": "CORRUPT_IMAGE"}, {"id": "0" * 64, "prefix": "a"}, {"id": "x"}, {"al": True}],
)
async def test_a_retry_says_what_of(client: Client, body: dict[str, Any]) -> None:
    await refused(await client.post("/v1/failures/retry", json=body), ErrorCode.INVALID_REQUEST)


async def test_a_retry_of_what_is_not_there_is_refused(client: Client) -> None:
    await refused(await client.post("/v1/failures/retry", json={"id": "0" * 64}), ErrorCode.IMAGE_NOT_FOUND)


async def test_a_key_with_places_sees_and_retries_what_lies_there(world: QueryWorld) -> None:
    await fail(world, "mine/one", ReasonCode.CORRUPT_IMAGE)
    theirs = await fail(world, "theirs/two", ReasonCode.CORRUPT_IMAGE)
    async with running(world, api_keys="required") as client:
        headers = await key_for(world, Scope.READ, Scope.WRITE, places=(f"{BUCKET}/mine/",))
        page = await (await client.get("/v1/failures", headers=headers)).json()
        assert [one["key"] for one in page["failures"]] == ["mine/one"]
        assert page["by_reason"] == {"CORRUPT_IMAGE": 1}
        job = await (await client.post("/v1/failures/retry", json={"all": True}, headers=headers)).json()
        assert job["arguments"]["places"] == [{"bucket": BUCKET, "prefix": "mine/"}]
        assert (await client.get(f"/v1/jobs/{job['job_id']}", headers=headers)).status == 200
        deeper = await client.post("/v1/failures/retry", json={"all": True, "prefix": "mine/deep/"}, headers=headers)
        assert (await deeper.json())["arguments"]["places"] == [{"bucket": BUCKET, "prefix": "mine/deep/"}]
        elsewhere = await client.post("/v1/failures/retry", json={"all": True, "prefix": "theirs/"}, headers=headers)
        assert (await elsewhere.json())["arguments"]["places"] == []
        one = await client.post("/v1/failures/retry", json={"id": theirs}, headers=headers)
        await refused(one, ErrorCode.IMAGE_NOT_FOUND)
        scan = await world.metadata.add_job(JobKind.SCAN, ScanArguments(bucket=BUCKET).model_dump())
        await refused(await client.get(f"/v1/jobs/{scan.job_id}", headers=headers), ErrorCode.JOB_NOT_FOUND)


async def test_a_scan_and_a_verification_are_jobs(world: QueryWorld, client: Client) -> None:
    scan = await client.post("/v1/scans", json={"bucket": BUCKET, "prefix": "a/"})
    assert scan.status == 202
    job = await job_of(world, await scan.json())
    assert ScanArguments.model_validate(job.arguments) == ScanArguments(bucket=BUCKET, prefix="a/")
    verification = await client.post("/v1/verifications", json={})
    assert (verification.status, (await verification.json())["kind"]) == (202, "verify")
    for path in ("/v1/scans", "/v1/verifications"):
        error = await refused(await client.post(path, json={"bucket": "elsewhere"}), ErrorCode.INVALID_REQUEST)
        assert error["details"]["followed"] == [BUCKET]
    listed = await (await client.get("/v1/jobs?kind=scan")).json()
    assert [one["kind"] for one in listed["jobs"]] == ["scan"]


async def test_a_change_of_model_is_asked_for(world: QueryWorld, client: Client) -> None:
    response = await client.post("/v1/models/reindex", json={"model": "resnet50", "model_precision": "bf16"})
    job = await job_of(world, await response.json())
    assert ReindexArguments.model_validate(job.arguments) == ReindexArguments(model="resnet50", model_precision="bf16")
    for what in ("compare", "activate", "drop"):
        asked = await client.post(f"/v1/models/{what}", json={"model": "resnet50"})
        assert (asked.status, (await asked.json())["kind"]) == (202, what)
    await refused(await client.post("/v1/models/activate", json={}), ErrorCode.INVALID_REQUEST)


async def test_rolling_back_is_done_at_once(world: QueryWorld, client: Client) -> None:
    await refused(await client.post("/v1/models/rollback"), ErrorCode.MODEL_CHANGE_REFUSED)
    previous = replace(active(OTHER), name="before", collection="before_v1", state=ModelState.PREVIOUS)
    await world.vectors.create_collection(previous.collection, dimension=2)
    await world.metadata.add_model(previous)
    response = await client.post("/v1/models/rollback")
    assert (response.status, (await response.json())["name"]) == (200, "before")
    models = await (await client.get("/v1/models")).json()
    assert {one["fingerprint"]: one["state"] for one in models["models"]} == {OTHER: "active", FINGERPRINT: "previous"}


@pytest.mark.parametrize(
    ("data", "content_type", "code"),
    [
        (b"{", "application/json", ErrorCode.INVALID_BODY),
        (b"\xff", "application/json", ErrorCode.INVALID_BODY),
        (b"[]", "application/json", ErrorCode.INVALID_REQUEST),
        (b"[" * 10_000, "application/json", ErrorCode.INVALID_BODY),
        (b"{}", "text/plain", ErrorCode.UNSUPPORTED_MEDIA_TYPE),
        (b" " * 70_000, "application/json", ErrorCode.BODY_TOO_LARGE),
    ],
    ids=["broken", "no text", "no object", "deep", "no json", "large"],
)
async def test_a_body_that_is_none_is_refused(client: Client, data: bytes, content_type: str, code: ErrorCode) -> None:
    response = await client.post("/v1/failures/retry", data=data, headers={"Content-Type": content_type})
    await refused(response, code)
