"""Prepared pixels to unit vectors: which model, its files on this host, and the backend that runs it.

`prepare_model` at an upgrade; `open_embedder` and `check_golden` at every start. Importing this loads no runtime of models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.settings import ProcessorSettings, QuerySettings
from processors.embedding.bucket_weights import bring_from_bucket
from processors.embedding.catalog import ModelDescription, fingerprint
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.embedder import Embedder
from processors.embedding.golden_check import check_golden
from processors.embedding.host import check_host, uses_gpu
from processors.embedding.model_cache import ensure_converted
from processors.embedding.weights import WeightFolders, obtain, obtain_projection
from schemas.identity import ModelFingerprint

__all__ = ["PreparedModel", "check_golden", "open_embedder", "prepare_model"]


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """`path`: the file that this host's backend runs from."""

    description: ModelDescription
    fingerprint: ModelFingerprint
    path: Path


async def prepare_model(settings: ProcessorSettings | QuerySettings, say: Callable[[str], None]) -> PreparedModel:
    """Get the files of the model that the settings name: weights found or downloaded, checked, converted for the backend.

    Quick when that was done before. Raises ConfigurationError that says what to do.
    """
    description, precision = chosen(settings), precision_asked(settings)
    label = fingerprint(description, precision)
    # Before a collection is made that this host could not serve.
    check_host(settings, precision)
    return PreparedModel(description, label, await _model_file(description, settings, say))


async def open_embedder(
    description: ModelDescription, settings: ProcessorSettings | QuerySettings, say: Callable[[str], None] = lambda _: None
) -> Embedder:
    """The model, loaded and warm, on the backend that the settings name; its files are made ready first where they are not.

    Raises ConfigurationError. The caller closes it.
    """
    precision = precision_asked(settings)
    # Before a model is converted that could not run here.
    check_host(settings, precision)
    path = await _model_file(description, settings, say)
    # Imported here, because each brings its runtime along: a serving process must not load torch.
    if settings.model_backend == "torch":
        projection = await asyncio.to_thread(obtain_projection, description, WeightFolders.from_settings(settings), say)
        if uses_gpu(settings):
            from processors.embedding.cuda_backend import CudaEmbedder  # noqa: PLC0415

            return await CudaEmbedder(description, precision, path, settings.model_threads, projection).start()
        from processors.embedding.torch_backend import TorchEmbedder  # noqa: PLC0415

        return await TorchEmbedder(description, precision, path, settings.model_threads, projection).start()
    from processors.embedding.openvino_backend import OpenVinoEmbedder  # noqa: PLC0415

    return await OpenVinoEmbedder(description, precision, path, settings.model_threads).start()


async def _model_file(
    description: ModelDescription, settings: ProcessorSettings | QuerySettings, say: Callable[[str], None]
) -> Path:
    if settings.model_backend == "torch":
        await bring_from_bucket(description, settings, say)
        folders = WeightFolders.from_settings(settings)
        await asyncio.to_thread(obtain_projection, description, folders, say)
        return await asyncio.to_thread(obtain, description, folders, say)
    return await ensure_converted(description, settings, say)
