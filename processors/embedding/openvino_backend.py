"""The model in OpenVINO on the processor: the default runtime. Needs a converted model (model_cache.py), never torch."""

from __future__ import annotations

from pathlib import Path

from infra.errors import ConfigurationError
from processors.embedding.catalog import ModelDescription, Precision
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.model_thread import PICTURES_AT_ONCE, ModelThread
from processors.embedding.openvino_runtime import openvino


class OpenVinoEmbedder(ModelThread):
    # The first run of each batch size costs some 30 ms more: kernels are made for it.
    warm_up_sizes = range(1, PICTURES_AT_ONCE + 1)

    def __init__(self, description: ModelDescription, precision: Precision, model: Path, threads: int = 0) -> None:
        super().__init__(description, precision, threads)
        self._path = model

    def _load(self) -> None:
        options = {
            # Unless told, the plugin takes bf16 where the processor has it: other vectors under the same fingerprint.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            # Worker and query service share the processors; pinned threads would queue on one core with another idle.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = openvino.Core().compile_model(self._path, "CPU", options)
        except RuntimeError as error:
            raise ConfigurationError(
                f"OpenVINO cannot run {self._path} on this host. Remove that folder to have the model converted again."
            ) from error
        self._request = compiled.create_infer_request()

    def _infer(self, part: Pixels) -> Vectors:
        vectors: Vectors = self._request.infer([part], share_inputs=True)[0]
        return vectors
