"""Each kind of bad input gets its stable code, loses nothing, and costs its neighbours nothing. One worker, real servers."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from PIL import Image

from infra import vector_store
from infra.settings import ProcessorSettings
from schemas.events import Cause, OutcomeType, ReasonCode
from schemas.identity import ObjectRef, content_hash_of
from schemas.tables import ModelState, RowState
from schemas.topics import HEADER_REASON
from tests.conftest import FreshSettings
from tests.deployment import Deployment, deployed
from tests.pictures import draw, encoded, jpeg


@pytest.fixture(scope="module")
async def deployment(module_settings: FreshSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    settings = module_settings(
        ProcessorSettings, decode_workers=1, read_give_up_seconds=1.0, exclude="*.txt", max_object_bytes=2_000_000
    )
    async with deployed(settings, tmp_path_factory.mktemp("worker")) as made:
        made.worker()
        yield made
        assert await made.workers[0].stop() == 0


async def after(deployment: Deployment, **objects: bytes) -> None:
    """Put these objects with good neighbours around them, and wait until the worker has worked on all of them."""
    events = [await deployment.put("neighbour-before.jpg", jpeg(1))]
    events += [await deployment.put(key, data) for key, data in objects.items()]
    events.append(await deployment.put("neighbour-after.jpg", jpeg(2)))
    await deployment.send(events)
    await deployment.settle()


def png_header(width: int, height: int) -> bytes:
    """A picture that is small as a file and huge as pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"><rect width="40" height="40"/></svg>'
)

REFUSED: dict[str, tuple[Callable[[], bytes], ReasonCode]] = {
    "empty.jpg": (lambda: b"", ReasonCode.EMPTY_OBJECT),
    "text.jpg": (lambda: b"this is no picture", ReasonCode.NOT_AN_IMAGE),
    "truncated.jpg": (lambda: jpeg(3)[:2000], ReasonCode.CORRUPT_IMAGE),
    "bomb.png": (lambda: png_header(50_000, 50_000), ReasonCode.TOO_MANY_PIXELS),
    "dot.png": (lambda: encoded(Image.new("RGB", (1, 1)), "PNG"), ReasonCode.IMAGE_TOO_SMALL),
    "drawing.svg": (lambda: SVG, ReasonCode.UNSUPPORTED_FORMAT),
    "large.jpg": (lambda: jpeg(4) + b"\0" * 2_000_000, ReasonCode.OBJECT_TOO_LARGE),
    "tiff.tif": (lambda: encoded(draw(5, (60, 50)), "TIFF"), ReasonCode.UNSUPPORTED_FORMAT),
}


@pytest.mark.parametrize("key", REFUSED)
async def test_what_is_no_picture_fails_with_its_code(deployment: Deployment, key: str) -> None:
    make, reason = REFUSED[key]
    await after(deployment, **{key: make()})
    row = await deployment.row(key)
    assert row is not None
    assert (row.state, row.reason) == (RowState.FAILED, reason)
    assert row.message
    told = [outcome for outcome in await deployment.outcomes() if outcome.data.key == key]
    assert [(outcome.type, outcome.data.reason) for outcome in told] == [(OutcomeType.FAILED, reason)]
    letters = [letter for letter in await deployment.dead_letters() if key.encode() in letter.value]
    assert [letter.headers[HEADER_REASON] for letter in letters] == [reason]
    for neighbour in ("neighbour-before.jpg", "neighbour-after.jpg"):
        beside = await deployment.row(neighbour)
        assert beside is not None
        assert beside.state is RowState.INDEXED


def animated_gif() -> bytes:
    buffer = io.BytesIO()
    frames = [draw(seed, (80, 60)) for seed in (10, 11)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(draw(12, (80, 60)), exif=exif)


ACCEPTED: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "moving.gif": (animated_gif, (80, 60)),
    "deep.png": (
        lambda: encoded(Image.fromarray(np.linspace(0, 65535, 80 * 60, dtype=np.uint16).reshape(60, 80)), "PNG"),
        (80, 60),
    ),
    "print.jpg": (lambda: encoded(draw(13, (80, 60)).convert("CMYK")), (80, 60)),
    "see-through.png": (lambda: encoded(draw(14, (80, 60)).convert("RGBA"), "PNG"), (80, 60)),
    "turned.jpg": (rotated_by_exif, (60, 80)),
    "modern.avif": (lambda: encoded(draw(15, (80, 60)), "AVIF"), (80, 60)),
    "web.webp": (lambda: encoded(draw(16, (80, 60)), "WEBP"), (80, 60)),
}


@pytest.mark.parametrize("key", ACCEPTED)
async def test_unusual_pictures_are_indexed(deployment: Deployment, key: str) -> None:
    make, size = ACCEPTED[key]
    await after(deployment, **{key: make()})
    row = await deployment.row(key)
    assert row is not None
    assert (row.state, (row.width, row.height)) == (RowState.INDEXED, size)


async def test_folders_and_excluded_keys_are_ignored_not_failed(deployment: Deployment) -> None:
    await after(deployment, **{"notes.txt": b"text"})
    row = await deployment.row("notes.txt")
    assert row is not None
    assert (row.state, row.reason) == (RowState.IGNORED, ReasonCode.EXCLUDED_BY_RULE)
    assert [outcome.type for outcome in await deployment.outcomes() if outcome.data.key == "notes.txt"] == [OutcomeType.IGNORED]


async def test_broken_bytes_over_a_good_picture_take_its_vector_away(deployment: Deployment) -> None:
    await after(deployment, **{"spoilt.jpg": jpeg(20)})
    assert "spoilt.jpg" in await keys_with_vectors(deployment)
    await after(deployment, **{"spoilt.jpg": jpeg(20)[:500]})
    assert "spoilt.jpg" not in await keys_with_vectors(deployment)
    row = await deployment.row("spoilt.jpg")
    assert row is not None
    assert row.state is RowState.FAILED


async def keys_with_vectors(deployment: Deployment) -> set[str]:
    (model,) = await deployment.metadata.models([ModelState.ACTIVE])
    vectors = await vector_store.connect(deployment.settings)
    try:
        return {entry.ref.key for entry in await vectors.page(model.collection)}
    finally:
        await vectors.close()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff not json 1", ReasonCode.EVENT_NOT_JSON),
        (b"{}", ReasonCode.EVENT_INVALID),
        (b'{"Records": []}', ReasonCode.EVENT_INVALID),
        (
            b'{"specversion":"1.0","id":"1","source":"/x","subject":"b/k","time":"2026-01-01T00:00:00Z",'
            b'"type":"image-search.image.indexed","data":{"bucket":"b","key":"k","cause":"scan"}}',
            ReasonCode.EVENT_UNKNOWN_TYPE,
        ),
    ],
)
async def test_what_is_no_event_becomes_a_dead_letter_and_the_rest_goes_on(
    deployment: Deployment, value: bytes, reason: ReasonCode
) -> None:
    await deployment.send_raw(value)
    await after(deployment)
    letters = [letter for letter in await deployment.dead_letters() if letter.value == value]
    assert [letter.headers[HEADER_REASON] for letter in letters] == [reason]


async def test_doubled_and_disordered_events_change_nothing(deployment: Deployment) -> None:
    first = await deployment.put("order.jpg", jpeg(30))
    second = await deployment.put("order.jpg", jpeg(31))
    await deployment.send([second, second])
    await deployment.settle()
    await deployment.send([first, second, first])
    await deployment.settle()
    row = await deployment.row("order.jpg")
    assert row is not None
    assert row.content_hash == content_hash_of(jpeg(31))
    told = [outcome for outcome in await deployment.outcomes() if outcome.data.key == "order.jpg"]
    assert [outcome.type for outcome in told] == [OutcomeType.INDEXED]
    await deployment.verified()


async def test_an_object_deleted_or_overwritten_between_event_and_read(deployment: Deployment) -> None:
    vanished = await deployment.put("vanished.jpg", jpeg(40))
    await deployment.remove("vanished.jpg")
    replaced = await deployment.put("replaced.jpg", jpeg(41))
    await deployment.put("replaced.jpg", jpeg(42))
    await deployment.send([vanished, replaced])
    await deployment.settle()
    gone, row = await deployment.row("vanished.jpg"), await deployment.row("replaced.jpg")
    assert gone is not None
    assert gone.state is RowState.DELETED
    assert row is not None
    assert row.content_hash == content_hash_of(jpeg(42))
    assert [outcome for outcome in await deployment.outcomes() if outcome.data.key == "vanished.jpg"] == []
    await deployment.verified()


async def test_a_missing_bucket_deletes_nothing(deployment: Deployment) -> None:
    await after(deployment)
    before = await deployment.metadata.counts()
    elsewhere = deployment.event("a.jpg", bucket="no-such-bucket", etag="x", put_time=datetime.now(UTC) - timedelta(days=1))
    await deployment.send([elsewhere])
    await deployment.settle()
    object_id = ObjectRef("no-such-bucket", "a.jpg").object_id
    row = (await deployment.metadata.rows([object_id]))[object_id]
    assert (row.state, row.reason) == (RowState.FAILED, ReasonCode.BUCKET_NOT_FOUND)
    assert (await deployment.metadata.counts())[RowState.INDEXED] == before[RowState.INDEXED]
    await deployment.verified()


async def test_a_repair_of_everything_changes_nothing_that_is_right(deployment: Deployment) -> None:
    await after(deployment)
    rows = {key: row for key, row in (await deployment.rows()).items() if row.state is RowState.INDEXED}
    await deployment.send([deployment.event(key, cause=Cause.REPAIR) for key in rows])
    await deployment.settle()
    again = await deployment.rows()
    assert {key: again[key].content_hash for key in rows} == {key: row.content_hash for key, row in rows.items()}
    await deployment.verified()
