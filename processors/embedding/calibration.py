"""The pictures that int8 is calibrated on: gathered once, decoded for the model, and kept as one file named by its sha256.

The digest is part of the model's fingerprint, so the file is what makes the same model on another host, as weights are. It is
looked for where weights are.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import io
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from infra import object_store
from infra.errors import ConfigurationError, ImageRejected, PermanentError, StoreRefused
from infra.local_stack import sample_pictures
from infra.object_store import ObjectStat
from infra.settings import ProcessorSettings
from processors.decode_pool import DecodePool
from processors.embedding.catalog import ModelDescription
from processors.embedding.embedder import Pixels
from processors.embedding.weights import WeightFolders, file_digest

LEAST_PICTURES: Final = 32
"""Of fewer pictures of one's own the ranges of activations are not known better than from those that come with the program."""

_LOOKED_AT: Final = 10_000
"""Objects and files from which those to calibrate on are drawn. They are drawn by their names, so the same every time."""

_AT_ONCE: Final = 16

Candidate = TypeVar("Candidate")


async def gather(
    description: ModelDescription,
    settings: ProcessorSettings,
    buckets: Sequence[str],
    say: Callable[[str], None],
    *,
    only_own: bool = False,
) -> str:
    """Write the file of pictures and return its digest. They are of the folder that the settings name, else of `buckets`, and
    those that come with the program, which are there alone where the buckets hold too few, unless `only_own`.

    Raises ConfigurationError, and TransientError when the store does not answer.
    """
    folder = settings.calibration_dir
    source = str(folder) if folder else ", ".join(buckets) or "no bucket"
    pool = DecodePool.from_settings(description.decode_rules(settings), settings)
    try:
        await pool.start()
        candidates = _files(folder, settings) if folder else _objects(buckets, settings)
        own = await _decoded(candidates, pool, settings.calibration_pictures)
        shipped = await _decoded(_shipped(), pool, settings.calibration_pictures)
    finally:
        await pool.close()
    if len(own) < LEAST_PICTURES:
        if folder or only_own:
            raise ConfigurationError(
                f"to calibrate int8, {LEAST_PICTURES} of your own pictures are needed and {source} has {len(own)} that can "
                "be decoded: IMAGE_SEARCH_CALIBRATION_DIR"
            )
        own = []
        say(
            f"int8 is calibrated on the {len(shipped)} pictures that come with the program, not on your own: {source} has "
            f"fewer than {LEAST_PICTURES} that may be read. Better: set IMAGE_SEARCH_CALIBRATION_DIR"
        )
    else:
        say(f"int8 is calibrated on {len(own)} pictures of {source}, and the {len(shipped)} that come with the program")
    # Mirrored ones beside them: they are few. Pictures of one kind alone leave ranges that are too narrow for others: with 40
    # drawn ones the golden pictures' cosine to fp32 was 0.946, with both sets 0.997.
    pixels = np.stack([*own, *shipped, *(picture[:, ::-1] for picture in shipped)])
    return await asyncio.to_thread(_keep, pixels, WeightFolders.from_settings(settings).downloads)


def find_calibration(description: ModelDescription, folders: WeightFolders) -> Path:
    """The file with the pictures' digest. Reads all of it. Raises ConfigurationError that says what to copy where."""
    name = f"{description.calibration}.npy"
    for folder in filter(None, (folders.own, folders.downloads)):
        path = folder / name
        if path.is_file() and file_digest(path) == description.calibration:
            return path
    raise ConfigurationError(
        f"{description.name} in int8 was calibrated on pictures that are not on this host: copy {name} from the folder weights "
        f"in the cache of the host that ran `image-search upgrade` into {folders.by_hand}, or the converted model with it "
        "(docs/models.md)"
    )


def read_calibration(path: Path) -> Pixels:
    pixels: Pixels = np.load(path, allow_pickle=False)
    return pixels


def _keep(pixels: Pixels, folder: Path) -> str:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    partial = folder / f".{digest}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(buffer.getbuffer())
        partial.replace(folder / f"{digest}.npy")
    except OSError as error:
        raise ConfigurationError(f"the pictures to calibrate on cannot be kept in {folder}: {error.strerror}") from error
    return digest


async def _decoded(candidates: AsyncIterator[bytes], pool: DecodePool, most: int) -> list[Pixels]:
    """Pixels of the first `most` that can be decoded."""
    pixels: list[Pixels] = []
    waiting: list[bytes] = []

    async def decode_waiting() -> None:
        outcomes = await pool.decode(waiting)
        pixels.extend(outcome.pixels for outcome in outcomes if not isinstance(outcome, ImageRejected))
        waiting.clear()

    async for data in candidates:
        waiting.append(data)
        if len(waiting) == _AT_ONCE:
            await decode_waiting()
            if len(pixels) >= most:
                break
    await decode_waiting()
    return pixels[:most]


async def _shipped() -> AsyncIterator[bytes]:
    for path in sample_pictures.paths():
        yield await asyncio.to_thread(path.read_bytes)


async def _files(folder: Path, settings: ProcessorSettings) -> AsyncIterator[bytes]:
    def listed() -> list[Path]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size <= settings.max_object_bytes)
        return _drawn(((path, path.relative_to(folder).as_posix()) for path in files), settings.calibration_pictures)

    try:
        for path in await asyncio.to_thread(listed):
            yield await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        raise ConfigurationError(f"IMAGE_SEARCH_CALIBRATION_DIR: {error.filename}: {error.strerror}") from error


async def _objects(buckets: Sequence[str], settings: ProcessorSettings) -> AsyncIterator[bytes]:
    if not buckets:
        return
    store = await object_store.connect(settings)
    try:
        seen: list[ObjectStat] = []
        for bucket in buckets:
            async for page in store.list_pages(bucket):
                seen += [stat for stat in page if not stat.is_directory_marker and stat.size <= settings.max_object_bytes]
                if len(seen) >= _LOOKED_AT:
                    break
        drawn = _drawn(((stat, f"{stat.ref.bucket}/{stat.ref.key}") for stat in seen), settings.calibration_pictures)
        for stat in drawn:
            try:
                yield (await store.read(stat.ref, max_bytes=settings.max_object_bytes)).data
            except PermanentError:
                # Gone meanwhile, or too large.
                continue
    except StoreRefused:
        # The account that makes collections may see which objects there are, and need not be allowed to read them.
        return
    finally:
        await store.close()


def _drawn(named: Iterable[tuple[Candidate, str]], most: int) -> list[Candidate]:
    """By the digest of their names: the same every time, and not all from the folder that is listed first.

    Twice as many as are needed, because some of them are no pictures.
    """
    few = heapq.nsmallest(
        2 * most, islice(named, _LOOKED_AT), key=lambda candidate: hashlib.sha256(candidate[1].encode()).digest()
    )
    return [candidate for candidate, _ in few]
