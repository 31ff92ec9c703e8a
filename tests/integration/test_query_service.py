"""The query service with the real model, on real servers, beside a real worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient
from PIL import Image

from infra.local_stack import ports
from infra.metadata_store.interface import Cursor
from infra.settings import ENV_PREFIX, ProcessorSettings
from query_service.app import init_app
from query_service.sse import Message, Parser
from schemas.api import ErrorCode
from tests.conftest import FreshSettings
from tests.deployment import environment_of
from tests.pictures import draw, edited_copy, encoded, jpeg
from tests.query_deployment import Service, query_settings, serving
from tests.query_world import Server
from tests.stack import IMAGE_SEARCH

KEYS = [f"set/{number}.jpg" for number in range(12)]


@pytest.fixture(scope="module")
async def service(module_settings: FreshSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with serving(module_settings(ProcessorSettings), tmp_path_factory.mktemp("query")) as service:
        tokens = [await service.put(key, jpeg(seed)) for seed, key in enumerate(KEYS)]
        # The worker takes its time to start, longer than `wait_for` waits.
        await service.deployment.settle()
        for token in tokens:
            await service.search(jpeg(0), wait_for=token, limit="1")
        yield service


def keys_of(answer: dict[str, Any]) -> list[str]:
    return [hit["key"] for hit in answer["hits"]]


@pytest.mark.parametrize("seed", range(0, 12, 3))
async def test_an_edited_copy_finds_its_original(service: Service, seed: int) -> None:
    answer = await service.search(edited_copy(jpeg(seed)))
    first, second = answer["hits"][:2]
    assert first["key"] == f"set/{seed}.jpg"
    assert first["score"] > second["score"]
    assert (first["width"], first["height"], first["format"]) == (500, 400, "JPEG")


async def test_the_same_bytes_score_100(service: Service) -> None:
    hit = (await service.search(jpeg(5), limit="1"))["hits"][0]
    assert (hit["key"], hit["score"], hit["distance"]) == (
        "set/5.jpg",
        pytest.approx(100, abs=0.01),
        pytest.approx(0, abs=0.001),
    )


async def test_limit_min_score_bucket_and_prefix(service: Service) -> None:
    bucket = service.deployment.bucket
    assert len(keys_of(await service.search(jpeg(0), limit="1000", bucket=bucket, prefix="set/"))) == len(KEYS)
    assert len(keys_of(await service.search(jpeg(0), limit="3", prefix="set/"))) == 3
    assert keys_of(await service.search(jpeg(0), min_score="99.9", prefix="set/")) == ["set/0.jpg"]
    assert set(keys_of(await service.search(jpeg(0), prefix="set/1"))) == {"set/1.jpg", "set/10.jpg", "set/11.jpg"}
    assert keys_of(await service.search(jpeg(0), bucket="another-bucket")) == []


@pytest.mark.parametrize("key", ['it\'s "q\\uoted".jpg', "a b+c%20%.jpg", "日本/ä.jpg", "set/%_.jpg"])
async def test_odd_keys_are_found_and_served(service: Service, key: str) -> None:
    data = jpeg(zlib.crc32(key.encode()))
    token = await service.put(key, data)
    answer = await service.search(data, wait_for=token, prefix=key[:-1], limit="1")
    assert keys_of(answer) == [key]
    content = await service.client.get(answer["hits"][0]["url"])
    assert (await content.read(), content.headers["Content-Type"]) == (data, "image/jpeg")
    await service.search(data, wait_for=await service.delete(key))


async def test_what_is_put_and_deleted_over_http_is_found_and_gone_for_who_waits(service: Service) -> None:
    data, path = jpeg(4711), f"/v1/images/{service.deployment.bucket}/over/http.jpg"
    put = await (await service.client.put(path, data=data, headers={"Content-Type": "image/jpeg"})).json()
    # As the bridge would announce it.
    await service.deployment.send([service.deployment.event("over/http.jpg", etag=put["etag"])])
    assert keys_of(await service.search(data, wait_for=put["wait_for"], limit="1")) == ["over/http.jpg"]
    deleted = await (await service.client.delete(f"/v1/images/{put['id']}")).json()
    await service.deployment.send([service.deployment.event("over/http.jpg", removed=True)])
    assert keys_of(await service.search(data, wait_for=deleted["wait_for"], prefix="over/")) == []
    assert (await service.client.get(f"/v1/images/{put['id']}")).status == 404


async def test_a_put_is_found_by_the_search_that_waits_for_it(service: Service) -> None:
    data = b""
    for round_number in range(5):
        data = jpeg(1000 + round_number)
        token = await service.put("mine.jpg", data)
        answer = await service.search(data, wait_for=token, limit="1")
        assert keys_of(answer) == ["mine.jpg"]
        assert answer["hits"][0]["score"] == pytest.approx(100, abs=0.01)
    token = await service.delete("mine.jpg")
    assert "mine.jpg" not in keys_of(await service.search(data, wait_for=token))
    response = await service.client.get(f"/v1/images/{service.id_of('mine.jpg')}")
    assert (await response.json())["error"]["code"] == ErrorCode.IMAGE_NOT_FOUND


async def test_what_is_deleted_is_hidden_at_once_although_its_vector_lingers(service: Service) -> None:
    data = jpeg(2000)
    await service.search(data, wait_for=await service.put("soon-gone.jpg", data))
    await service.delete("soon-gone.jpg")
    while (await service.client.get(f"/v1/images/{service.id_of('soon-gone.jpg')}")).status == 200:
        await asyncio.sleep(0.005)
    # Without Strong consistency: the vector may well still be seen, its row says no.
    assert "soon-gone.jpg" not in keys_of(await service.search(data))


async def test_waiting_ends_when_a_picture_fails(service: Service) -> None:
    token = await service.put("broken.jpg", jpeg(3)[:300])
    image = await (await service.client.get(f"/v1/images/{service.id_of('broken.jpg')}", params={"wait_for": token})).json()
    assert (image["state"], image["reason"]) == ("failed", "CORRUPT_IMAGE")
    similar = await service.client.get(f"/v1/images/{service.id_of('broken.jpg')}/similar")
    assert (await similar.json())["error"]["code"] == ErrorCode.IMAGE_NOT_INDEXED
    content = await service.client.get(f"/v1/images/{service.id_of('broken.jpg')}/content")
    assert content.headers["Content-Disposition"].startswith("attachment")


def png_header(width: int, height: int) -> bytes:
    whole = encoded(Image.new("L", (8, 8)), "PNG")
    body = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + whole[24:29]
    return whole[:12] + body + zlib.crc32(body).to_bytes(4) + whole[33:]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"just text", ErrorCode.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ErrorCode.UNSUPPORTED_FORMAT),
        (jpeg(0)[:300], ErrorCode.CORRUPT_IMAGE),
        (png_header(50_000, 50_000), ErrorCode.TOO_MANY_PIXELS),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), ErrorCode.IMAGE_TOO_SMALL),
        (encoded(Image.new("RGB", (64, 64)), "TIFF"), ErrorCode.UNSUPPORTED_FORMAT),
    ],
)
async def test_pictures_that_are_refused(service: Service, data: bytes, code: ErrorCode) -> None:
    response = await service.client.post("/v1/search", data=data)
    body = await response.json()
    assert (body["error"]["code"], response.status) == (code, code.status)
    # The next one is served.
    assert keys_of(await service.search(jpeg(0), limit="1")) == ["set/0.jpg"]


async def test_pictures_of_every_kind_find_the_same(service: Service) -> None:
    picture = draw(7)
    cmyk = encoded(picture.convert("CMYK"))
    alpha = encoded(picture.convert("RGBA"), "PNG")
    for data in (encoded(picture, "PNG"), encoded(picture, "WEBP"), encoded(picture, "BMP"), cmyk, alpha):
        assert keys_of(await service.search(data, limit="1", prefix="set/")) == ["set/7.jpg"]


async def test_similar_and_list(service: Service) -> None:
    response = await service.client.get(f"/v1/images/{service.id_of('set/4.jpg')}/similar", params={"prefix": "set/"})
    found = keys_of(await response.json())
    assert sorted([*found, "set/4.jpg"]) == sorted(KEYS)
    page = await (await service.client.get("/v1/images", params={"prefix": "set/", "limit": "5"})).json()
    assert [image["key"] for image in page["images"]] == sorted(KEYS)[:5]
    rest = await (await service.client.get("/v1/images", params={"prefix": "set/", "cursor": page["next"]})).json()
    assert ([image["key"] for image in rest["images"]], rest["next"]) == (sorted(KEYS)[5:], None)


async def test_many_searches_at_once(service: Service) -> None:
    answers = await asyncio.gather(*(service.search(jpeg(number % 12), limit="1") for number in range(64)))
    assert [keys_of(answer) for answer in answers] == [[f"set/{number % 12}.jpg"] for number in range(64)]


async def test_many_searches_at_once_answer_as_each_alone(service: Service) -> None:
    """Also with what the service remembers: the pictures are new to it, and asked for again one by one."""
    pictures = [edited_copy(jpeg(number)) + b"new" for number in range(12)]
    together = await asyncio.gather(*(service.search(picture, prefix="set/") for picture in pictures * 2))
    assert any(answer["timing_ms"]["embed"] is not None for answer in together)
    for picture, *answers in zip(pictures, together[:12], together[12:], strict=True):
        remembered = await service.search(picture, prefix="set/")
        assert (remembered["timing_ms"]["decode"], remembered["timing_ms"]["embed"]) == (None, None)
        alone = await service.search(picture + b"unremembered", prefix="set/")
        assert alone["timing_ms"]["embed"] is not None
        for answer in (*answers, remembered):
            assert keys_of(answer) == keys_of(alone)
            scores = [hit["score"] for hit in answer["hits"]]
            assert scores == pytest.approx([hit["score"] for hit in alone["hits"]], abs=0.01)


async def test_a_service_that_is_full_says_so_and_answers_those_it_let_in(service: Service) -> None:
    settings = query_settings(service.deployment.settings, queries_at_once=1, queries_waiting=1, recent_query_vectors=0)
    async with TestClient(Server(init_app(settings))) as client:

        async def ask(number: int) -> aiohttp.ClientResponse:
            response = await client.post("/v1/search", data=jpeg(number % 12), params={"limit": "1"})
            await response.read()
            return response

        responses = await asyncio.gather(*(ask(number) for number in range(24)))
        assert {response.status for response in responses} == {200, 429}
        for number, response in enumerate(responses):
            body = await response.json()
            if response.status == 429:
                assert (body["error"]["code"], response.headers["Retry-After"]) == (ErrorCode.TOO_MANY_REQUESTS, "1")
            else:
                assert keys_of(body) == [f"set/{number % 12}.jpg"]
        assert (await ask(3)).status == 200


async def messages_of(response: aiohttp.ClientResponse, until: int | None = None) -> list[Message]:
    parser, found = Parser(), []
    async for line in response.content:
        message = parser.feed(line.decode().rstrip("\n"))
        if message is not None:
            found.append(message)
            if len(found) == until:
                break
    return found


async def test_events_replayed_in_parts_are_the_outcomes(service: Service) -> None:
    await service.deployment.settle()
    published = {(event.id, event.data.generation) for event in await service.deployment.outcomes()}
    seen: list[Message] = []
    while True:
        parameters = {"follow": "false", "cursor": seen[-1].last_id if seen else "earliest"}
        async with service.client.get("/v1/events", params=parameters) as response:
            part = await messages_of(response, until=5)
        if not part:
            break
        seen += part
    events = [json.loads(message.data) for message in seen]
    assert {(event["id"], event["data"]["generation"]) for event in events} == published
    assert len(events) == len(published)
    for object_id in {event["data"]["object_id"] for event in events}:
        generations = [event["data"]["generation"] for event in events if event["data"]["object_id"] == object_id]
        assert generations == sorted(generations)


async def test_events_live(service: Service) -> None:
    async with service.client.get("/v1/events", params={"prefix": "live/"}) as response:
        await response.content.readline()
        await service.put("live/one.jpg", jpeg(3000))
        async with asyncio.timeout(10):
            [message] = await messages_of(response, until=1)
    event = json.loads(message.data)
    assert (event["type"], event["data"]["key"]) == ("image-search.image.indexed", "live/one.jpg")


async def test_status_and_freshness(service: Service) -> None:
    await service.deployment.settle()
    cursor = Cursor(position=time.time_ns(), clean=False)
    await service.deployment.metadata.save_cursor(f"seaweedfs/{service.deployment.bucket}", cursor)
    async with asyncio.timeout(10):
        while True:
            status = await (await service.client.get("/v1/status")).json()
            if status["freshness"]["reason"] is None:
                break
            await asyncio.sleep(0.1)
    assert status["images"]["indexed"] >= len(KEYS)
    assert status["lag"]["objects"] == {"pending": 0, "partitions": 2}
    assert 0 < status["freshness"]["lag_ms"] < 10_000
    assert status["model"]["name"] == "efficientnet_lite0"
    answer = await service.search(jpeg(0), limit="1")
    assert answer["indexed_through"] >= status["freshness"]["indexed_through"]
    ready = await service.client.get("/healthz/ready")
    assert (ready.status, (await ready.json())["ready"]) == (200, True)


# -- as a process, with its commands -------------------------------------------------------------------------------------
async def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, [IMAGE_SEARCH, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def environment(service: Service, tmp_path: Path) -> dict[str, str]:
    port = ports.find_free(1)[0]
    return {
        **os.environ,
        **environment_of(service.deployment.settings),
        f"{ENV_PREFIX}STATE_DIR": str(tmp_path),
        f"{ENV_PREFIX}API_KEYS": "off",
        f"{ENV_PREFIX}QUERY_PORT": str(port),
        f"{ENV_PREFIX}QUERY_URL": f"http://127.0.0.1:{port}",
    }


async def test_serve_search_and_events_as_commands(service: Service, environment: dict[str, str], tmp_path: Path) -> None:
    picture = tmp_path / "edited.jpg"
    picture.write_bytes(edited_copy(jpeg(6)))
    log = (tmp_path / "serve.log").open("wb")
    process = await asyncio.to_thread(subprocess.Popen, [IMAGE_SEARCH, "serve"], env=environment, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while not await _is_ready(session, environment[f"{ENV_PREFIX}QUERY_URL"]):
                assert process.poll() is None, (tmp_path / "serve.log").read_text()
                await asyncio.sleep(0.1)
            found = await run(environment, "search", str(picture), "--limit", "2", "--prefix", "set/", "--json")
            assert keys_of(json.loads(found.stdout))[0] == "set/6.jpg"
            table = await run(environment, "search", str(picture), "--limit", "2")
            assert "set/6.jpg" in table.stdout
            events = await run(environment, "events", "--json", "--prefix", "set/", "--type", "indexed")
            assert {json.loads(line)["event"]["data"]["key"] for line in events.stdout.splitlines()} >= set(KEYS)
            refused = await run(environment, "search", str(tmp_path / "serve.log"))
            assert (refused.returncode, ErrorCode.NOT_AN_IMAGE in refused.stderr) == (1, True)
            # A stream that never ends by itself must not keep the process from stopping.
            async with session.get(f"{environment[f'{ENV_PREFIX}QUERY_URL']}/v1/events") as stream:
                await stream.content.readline()
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        process.kill()
        process.wait()
        log.close()
    away = await run(environment, "search", str(picture))
    assert (away.returncode, "does not answer" in away.stderr) == (1, True)


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/healthz/ready") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def test_another_model_is_refused_with_what_to_do(environment: dict[str, str]) -> None:
    refused = await run({**environment, f"{ENV_PREFIX}MODEL": "resnet50"}, "serve")
    assert refused.returncode == 2
    assert "IMAGE_SEARCH_MODEL=efficientnet_lite0" in refused.stderr


async def test_a_port_that_is_taken_is_named(service: Service, environment: dict[str, str]) -> None:
    taken = str(service.client.port)
    refused = await run({**environment, f"{ENV_PREFIX}QUERY_PORT": taken}, "serve")
    assert refused.returncode == 2
    assert f"127.0.0.1:{taken}" in refused.stderr
