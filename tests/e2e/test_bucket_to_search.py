"""A client that knows nothing of us puts, overwrites, copies and deletes, and the searches follow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.conftest import WAIT_SECONDS, Deployment
from tests.pictures import draw, edited_copy, encoded, jpeg


def first(hits: list[dict[str, Any]]) -> str:
    return str(hits[0]["key"])


def settled(deployment: Deployment, token: str) -> dict[str, Any]:
    """The object's row, once it says something about the bytes that the token names."""
    object_id = token.split(":", 1)[0]
    answer = requests.get(
        f"{deployment.stack.query_url}/v1/images/{object_id}", params={"wait_for": token}, timeout=WAIT_SECONDS
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_picture_is_found_by_itself_and_by_an_edited_copy(deployment: Deployment) -> None:
    picture = jpeg(1)
    token = deployment.put("found/one.jpg", picture)
    deployment.put("found/other.jpg", jpeg(2))
    hits = deployment.search(picture, wait_for=token)
    assert first(hits) == "found/one.jpg"
    assert hits[0]["score"] == pytest.approx(100, abs=0.1)
    assert hits[0]["distance"] == pytest.approx(0, abs=0.002)
    assert first(deployment.search(edited_copy(picture))) == "found/one.jpg"


def test_an_overwrite_is_found_by_its_new_picture_only(deployment: Deployment) -> None:
    old, new = jpeg(10), jpeg(11)
    token = deployment.put("over/a.jpg", old)
    assert first(deployment.search(old, wait_for=token)) == "over/a.jpg"
    token = deployment.put("over/a.jpg", new)
    assert first(deployment.search(new, wait_for=token)) == "over/a.jpg"
    assert all(hit["key"] != "over/a.jpg" or hit["score"] < 99 for hit in deployment.search(old))


def test_a_copy_is_found_beside_its_original_and_survives_it(deployment: Deployment) -> None:
    picture = jpeg(20)
    token = deployment.put("copy/a.jpg", picture)
    settled(deployment, token)
    etag = deployment.s3.copy_object(
        Bucket=deployment.bucket, Key="copy/b.jpg", CopySource={"Bucket": deployment.bucket, "Key": "copy/a.jpg"}
    )["CopyObjectResult"]["ETag"].strip('"')
    hits = deployment.search(picture, wait_for=f"{deployment.id_of('copy/b.jpg')}:{etag}", min_score=99)
    assert {hit["key"] for hit in hits} == {"copy/a.jpg", "copy/b.jpg"}
    hits = deployment.search(picture, wait_for=deployment.delete("copy/a.jpg"), min_score=99)
    assert {hit["key"] for hit in hits} == {"copy/b.jpg"}


def test_what_is_deleted_is_gone_and_can_come_back(deployment: Deployment) -> None:
    picture = jpeg(30)
    token = deployment.put("gone/a.jpg", picture)
    assert first(deployment.search(picture, wait_for=token)) == "gone/a.jpg"
    hits = deployment.search(picture, wait_for=deployment.delete("gone/a.jpg"), min_score=99)
    assert hits == []
    assert first(deployment.search(picture, wait_for=deployment.put("gone/a.jpg", picture))) == "gone/a.jpg"


def test_a_multipart_upload_is_found(deployment: Deployment) -> None:
    picture = encoded(draw(40, (2600, 1900)), "PNG")
    assert len(picture) > 5 * 1024 * 1024
    s3, place = deployment.s3, {"Bucket": deployment.bucket, "Key": "parts/large.png"}
    upload = s3.create_multipart_upload(**place)["UploadId"]
    half = 5 * 1024 * 1024
    parts = []
    for number, part in enumerate((picture[:half], picture[half:]), start=1):
        etag = s3.upload_part(**place, UploadId=upload, PartNumber=number, Body=part)["ETag"]
        parts.append({"ETag": etag, "PartNumber": number})
    etag = s3.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})["ETag"].strip('"')
    assert first(deployment.search(picture, wait_for=f"{deployment.id_of('parts/large.png')}:{etag}")) == "parts/large.png"


def test_tags_make_no_new_generation(deployment: Deployment) -> None:
    token = deployment.put("tags/a.jpg", jpeg(50))
    before = settled(deployment, token)
    deployment.s3.put_object_tagging(
        Bucket=deployment.bucket, Key="tags/a.jpg", Tagging={"TagSet": [{"Key": "colour", "Value": "blue"}]}
    )
    settled(deployment, deployment.put("tags/later.jpg", jpeg(51)))
    time.sleep(1)
    assert settled(deployment, token)["generation"] == before["generation"]


@pytest.mark.parametrize(
    "key",
    [
        "a b.jpg",
        "a+b.jpg",
        "a%20b.jpg",
        "100%.jpg",
        "dir/ä é.jpg",
        "日本/写真.jpg",
        "quote'\".jpg",
        "A.jpg",
        "a.jpg",
        "a.jpg ",
        "/".join(["long" * 50] * 5)[:1020] + ".jpg",
    ],
)
def test_a_key_of_any_form_goes_the_whole_way(deployment: Deployment, key: str) -> None:
    picture = jpeg(sum(key.encode()) + 1000)
    hits = deployment.search(picture, wait_for=deployment.put(key, picture))
    assert first(hits) == key
    content = requests.get(f"{deployment.stack.query_url}/v1/images/{hits[0]['id']}/content", timeout=WAIT_SECONDS)
    assert content.content == picture
    assert all(hit["key"] != key for hit in deployment.search(picture, wait_for=deployment.delete(key), min_score=99))


def test_a_search_is_narrowed_to_a_prefix(deployment: Deployment) -> None:
    picture = jpeg(60)
    deployment.put("north/a.jpg", picture)
    token = deployment.put("south/a.jpg", picture)
    hits = deployment.search(picture, wait_for=token, prefix="south/", bucket=deployment.bucket)
    assert {hit["key"].split("/")[0] for hit in hits} == {"south"}
    assert deployment.search(picture, bucket="no-such-bucket") == []


def test_commands_do_what_they_say(deployment: Deployment, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    (folder / "day one").mkdir(parents=True)
    for number, name in enumerate(("beach.jpg", "day one/hotel.jpg")):
        (folder / name).write_bytes(jpeg(70 + number))
    deployment.stack.run("put", str(folder))
    query = tmp_path / "query.jpg"
    query.write_bytes(edited_copy(jpeg(70)))
    settled(deployment, f"{deployment.id_of('beach.jpg')}:{_etag(deployment, 'beach.jpg')}")
    found = json.loads(deployment.stack.run("search", str(query), "--limit", "1", "--json").stdout)
    assert found["hits"][0]["key"] == "beach.jpg"
    assert "beach.jpg" in deployment.stack.run("search", str(query)).stdout
    events = [json.loads(line) for line in deployment.stack.run("events", "--json", "--cursor", "earliest").stdout.splitlines()]
    assert any(event["event"]["data"]["key"] == "day one/hotel.jpg" for event in events)
    status = json.loads(deployment.stack.run("status", "--json").stdout)
    assert status


def _etag(deployment: Deployment, key: str) -> str:
    return str(deployment.s3.head_object(Bucket=deployment.bucket, Key=key)["ETag"]).strip('"')


def test_a_scan_says_that_nothing_is_missing_and_verify_is_clean(deployment: Deployment) -> None:
    deployment.stack.run("scan")
    report = json.loads(deployment.stack.run("verify", "--json").stdout)
    assert report["clean"] is True


def test_what_failed_is_listed_by_reason_and_tried_again(deployment: Deployment) -> None:
    key = "failed/broken.jpg"
    deployment.image(key, wait_for=deployment.put(key, jpeg(80)[:200]))
    reason = deployment.image(key).json()["reason"]
    asked = {"reason": reason, "prefix": "failed/"}
    listed = requests.get(f"{deployment.stack.query_url}/v1/failures", params=asked, timeout=30).json()
    assert [(failure["key"], failure["attempt"]) for failure in listed["failures"]] == [(key, 1)]
    job = ask_for(deployment, "/v1/failures/retry", asked)
    assert (job["state"], job["progress"]["written"]) == ("done", 1)
    eventually(lambda: deployment.image(key).json()["attempt"] == 2)
    token = deployment.delete(key)
    assert deployment.image(key, wait_for=token).status_code == 404


def test_a_scan_and_a_verification_are_asked_for_over_http(deployment: Deployment) -> None:
    scan = ask_for(deployment, "/v1/scans", {"bucket": deployment.bucket})
    assert (scan["state"], scan["progress"]["phase"]) == ("done", "done")
    report = ask_for(deployment, "/v1/verifications", {})
    assert (report["state"], report["progress"]["clean"], report["progress"]["findings"]) == ("done", True, {})


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask_for(deployment: Deployment, path: str, body: dict[str, object]) -> dict[str, Any]:
    """The job as it ended."""
    url = deployment.stack.query_url
    answer = requests.post(f"{url}{path}", json=body, timeout=30)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = {}

    def ended() -> bool:
        job.update(requests.get(f"{url}/v1/jobs/{answer.json()['job_id']}", timeout=30).json())
        return job["state"] not in ("queued", "running")

    eventually(ended)
    return job


def test_no_serving_process_holds_torch_and_all_fit_in_4_gib(deployment: Deployment) -> None:
    assert deployment.stack.processes_with("libtorch") == []
    assert sum(deployment.stack.resident_bytes().values()) < 4 * 2**30
