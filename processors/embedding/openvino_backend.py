"""The model in OpenVINO on the processor: the default runtime. Needs a converted model (model_cache.py), never torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from infra.errors import ConfigurationError
from processors.embedding.catalog import ModelDescription, Precision
from processors.embedding.embedder import Pixels, Vectors
from processors.embedding.golden_check import GoldenVectors, golden_pixels, held_to
from processors.embedding.model_cache import GOLDEN_FILE
from processors.embedding.model_thread import PICTURES_AT_ONCE, ModelThread
from processors.embedding.openvino_runtime import openvino

# Of int8 what is left in floats: the layers that quantize.py spares.
_HINTS: Final[dict[Precision, str]] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


class OpenVinoEmbedder(ModelThread):
    # The first run of each batch size costs some 30 ms more: kernels are made for it.
    warm_up_sizes = range(1, PICTURES_AT_ONCE + 1)

    def __init__(self, description: ModelDescription, precision: Precision, model: Path, threads: int = 0) -> None:
        super().__init__(description, precision, threads)
        self._path = model

    def _load(self) -> None:
        options = {
            # Unless told, the plugin takes bf16 where the processor has it: other vectors under the same fingerprint.
            "INFERENCE_PRECISION_HINT": _HINTS[self._precision],
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
        self._check_converted()

    def _check_converted(self) -> None:
        """Against what torch made of the golden pictures when the model was converted, perhaps on another host."""
        file = self._path.with_name(GOLDEN_FILE)
        # Models that were converted by an earlier version have none.
        if file.is_file():
            golden = GoldenVectors.model_validate_json(file.read_bytes())
            vectors = self._infer(golden_pixels(self._description, golden.vectors))
            held_to(golden, vectors, self._description.name, self._precision)

    def _infer(self, part: Pixels) -> Vectors:
        vectors: Vectors = self._request.infer([part], share_inputs=True)[0]
        return vectors
