"""Converted models on this host's disk: one folder a fingerprint, made once, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings, QuerySettings
from processors.embedding.bucket_weights import bring_from_bucket
from processors.embedding.calibration import find_calibration
from processors.embedding.catalog import ModelDescription, Precision, fingerprint
from processors.embedding.choice import precision_asked
from processors.embedding.weights import WeightFolders, file_digest
from schemas.identity import ModelFingerprint

log = structlog.get_logger(__name__)

MODEL_FILE = "model.xml"
MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.json"
"""What torch made of the golden pictures in fp32, when this model was converted."""

CONVERSION_SECONDS = 1800.0
"""Longest time for a conversion; most of it is for a download on a slow line."""

_KEPT_OUTPUT_BYTES = 4096


class ConversionJob(BaseModel):
    """What the converting process is told, on its standard input."""

    model_config = ConfigDict(frozen=True)

    description: ModelDescription
    precision: Precision
    own_weights: Path | None
    downloads: Path
    calibration: Path | None = None
    models: Path
    parent_pid: int


class ConversionLine(BaseModel):
    """What it answers, a JSON line each: progress, or why it failed."""

    model_config = ConfigDict(frozen=True)

    say: str | None = None
    error: str | None = None


class Manifest(BaseModel):
    """Beside a converted model, written last. `files`: name to sha256."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    model: str
    precision: Precision
    openvino: str
    torch: str
    files: dict[str, str]


def model_folder(models: Path, label: ModelFingerprint) -> Path:
    return models / label


def find_converted(models: Path, label: ModelFingerprint) -> Path | None:
    """The converted model if it is there, whole and unchanged. Reads all of it: run it off the event loop."""
    folder = model_folder(models, label)
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        whole = manifest.fingerprint == label and MODEL_FILE in manifest.files
        if whole and all(file_digest(folder / name) == digest for name, digest in manifest.files.items()):
            return folder / MODEL_FILE
    except (OSError, ValidationError):
        pass
    return None


async def ensure_converted(
    description: ModelDescription, settings: ProcessorSettings | QuerySettings, say: Callable[[str], None]
) -> Path:
    """The OpenVINO form of the model, converted now unless that was done before. Raises ConfigurationError.

    Several processes may ask at once: one converts, the others wait for it.
    """
    precision = precision_asked(settings)
    label = fingerprint(description, precision)
    models = settings.cache_dir / "models"
    path = await asyncio.to_thread(find_converted, models, label)
    if path is not None:
        return path
    await bring_from_bucket(description, settings, say)
    folders = WeightFolders.from_settings(settings)
    job = ConversionJob(
        description=description,
        precision=precision,
        own_weights=folders.own,
        downloads=folders.downloads,
        calibration=await asyncio.to_thread(_calibration, description, folders) if precision == "int8" else None,
        models=models,
        parent_pid=os.getpid(),
    )
    say(f"converting {description.name} ({precision}) for this host")
    await _convert(job, say)
    path = await asyncio.to_thread(find_converted, models, label)
    if path is None:
        raise ConfigurationError(f"the converted {description.name} in {models} was damaged while it was written; try again")
    return path


def _calibration(description: ModelDescription, folders: WeightFolders) -> Path:
    # Before torch is loaded to be told.
    if importlib.util.find_spec("nncf") is None:
        raise ConfigurationError(
            "IMAGE_SEARCH_MODEL_PRECISION: to calibrate int8 a package is needed that is not installed (nncf): "
            "pip install 'image-search[training]', or copy the converted model here from a host that has it (docs/models.md)"
        )
    return find_calibration(description, folders)


async def _convert(job: ConversionJob, say: Callable[[str], None]) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "processors.embedding.convert",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    failure: str | None = None
    noise = asyncio.create_task(_last_bytes(process.stderr))
    try:
        async with asyncio.timeout(CONVERSION_SECONDS):
            process.stdin.write(job.model_dump_json().encode())
            process.stdin.close()
            async for line in process.stdout:
                answer = ConversionLine.model_validate_json(line)
                failure = answer.error or failure
                if answer.say:
                    say(answer.say)
            await process.wait()
    except TimeoutError:
        failure = f"converting {job.description.name} took longer than {CONVERSION_SECONDS:.0f} seconds"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        output = await noise
    if failure is not None:
        raise ConfigurationError(failure)
    if process.returncode != 0:
        log.error("conversion failed", model=job.description.name, exit_code=process.returncode, output=output)
        raise ConfigurationError(
            f"converting {job.description.name} failed with exit code {process.returncode}; what it wrote is in the log"
        )


async def _last_bytes(stream: asyncio.StreamReader) -> str:
    kept = b""
    while chunk := await stream.read(_KEPT_OUTPUT_BYTES):
        kept = (kept + chunk)[-_KEPT_OUTPUT_BYTES:]
    return kept.decode(errors="replace")
