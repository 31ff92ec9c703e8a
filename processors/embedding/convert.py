"""The converting process: `python -m processors.embedding.convert`, its job on standard input (model_cache.py).

A process of its own, because torch costs 700 MB that no service shall keep.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from infra.errors import ImageSearchError
from processors.child_process import die_with_parent
from processors.embedding.calibration import read_calibration
from processors.embedding.catalog import fingerprint
from processors.embedding.file_lock import locked
from processors.embedding.golden_check import GOLDEN_PICTURES, GoldenVectors, golden_pixels
from processors.embedding.model_cache import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    ConversionJob,
    ConversionLine,
    Manifest,
    find_converted,
    model_folder,
)
from processors.embedding.weights import WeightFolders, file_digest, obtain, obtain_projection
from schemas.identity import ModelFingerprint


def main() -> int:
    job = ConversionJob.model_validate_json(sys.stdin.buffer.read())
    die_with_parent(job.parent_pid)
    # Answers go to what was standard output; whatever a library prints there goes to the log with its errors.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)

        def answer(line: ConversionLine) -> None:
            answers.write(line.model_dump_json(exclude_none=True) + "\n")

        try:
            convert(job, lambda text: answer(ConversionLine(say=text)))
        except ImageSearchError as error:
            answer(ConversionLine(error=str(error)))
            return 1
        except OSError as error:
            answer(ConversionLine(error=f"cannot write the converted model to {job.models}: {error.strerror}"))
            return 1
    return 0


def convert(job: ConversionJob, say: Callable[[str], None]) -> None:
    """Put the converted model in its folder, whole or not at all. Raises ConfigurationError, OSError."""
    label = fingerprint(job.description, job.precision)
    job.models.mkdir(parents=True, exist_ok=True)
    with locked(job.models / f".{label}.lock"):
        if find_converted(job.models, label) is not None:
            return
        folders = WeightFolders(job.own_weights, job.downloads)
        weights = obtain(job.description, folders, say)
        projection = obtain_projection(job.description, folders, say)
        folder = model_folder(job.models, label)
        # Ours alone while the lock is held: whatever lies there is left of a process that was killed.
        scratch = job.models / f".{label}.partial"
        for leftover in (scratch, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir()
        _write_model(job, label, (weights, projection), scratch, say)
        scratch.rename(folder)
        say(f"{job.description.name} is converted: {folder}")


def _write_model(
    job: ConversionJob, label: ModelFingerprint, files: tuple[Path, Path | None], folder: Path, say: Callable[[str], None]
) -> None:
    # Only when there is something to convert: both take seconds to import.
    import torch  # noqa: PLC0415

    from processors.embedding.network import load_network  # noqa: PLC0415
    from processors.embedding.openvino_runtime import openvino  # noqa: PLC0415

    network = load_network(job.description, *files)
    shape = (*job.description.input_size, 3)
    with torch.inference_mode():
        # Traced with two pictures: with one, the tracer would take the batch for a constant.
        example = torch.zeros((2, *shape), dtype=torch.uint8)
        model = openvino.convert_model(network, example_input=example, input=[openvino.PartialShape([-1, *shape])])
        reference = network(torch.from_numpy(golden_pixels(job.description))).tolist()
    if job.calibration is not None:
        from processors.embedding.quantize import quantized  # noqa: PLC0415 - as above

        say(f"calibrating {job.description.name}: a minute or a few")
        model = quantized(model, job.description, read_calibration(job.calibration))
    openvino.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)
    golden = GoldenVectors(
        fingerprint=fingerprint(job.description, "fp32"), vectors=dict(zip(GOLDEN_PICTURES, reference, strict=True))
    )
    (folder / GOLDEN_FILE).write_text(golden.model_dump_json())
    # What this host would not serve is not kept.
    asyncio.run(_try(job, folder / MODEL_FILE))
    manifest = Manifest(
        fingerprint=label,
        model=job.description.name,
        precision=job.precision,
        openvino=openvino.get_version(),
        torch=torch.__version__,
        files={path.name: file_digest(path) for path in sorted(folder.iterdir())},
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")


async def _try(job: ConversionJob, model: Path) -> None:
    from processors.embedding.openvino_backend import OpenVinoEmbedder  # noqa: PLC0415 - as above

    embedder = await OpenVinoEmbedder(job.description, job.precision, model).start()
    await embedder.close()


if __name__ == "__main__":
    sys.exit(main())
