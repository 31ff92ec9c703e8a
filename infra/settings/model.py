"""Which model is used, how it runs on this host, and what is decoded for it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from infra.settings.base import Numbers, ServiceSettings


class ModelSettings(ServiceSettings):
    """Which model a collection is made with, and how it runs on this host."""

    model: str = Field("efficientnet_lite0", description="Name in the model catalog. Chosen once, when the collection is made.")
    model_backend: Literal["openvino", "torch"] = Field("openvino", description="Runtime of the model.")
    model_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where torch runs the model: on the processor, or on an NVIDIA GPU. auto: on the GPU if torch finds one. "
        "OpenVINO uses the processor.",
    )
    model_precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "fp32",
        description="Precision of the model. Part of its fingerprint. bf16 and int8 need a processor that has it. auto: the "
        "fastest on the host that makes the collection; kept from then on.",
    )
    calibration_dir: Path | None = Field(
        None,
        description="int8: folder of the pictures it is calibrated on; unset: those in the followed buckets, and where these "
        "are too few, pictures that come with the program.",
    )
    calibration_pictures: int = Field(300, ge=32, le=2000, description="int8: most pictures it is calibrated on.")
    calibration_sha256: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="int8: sha256 of the pictures it was calibrated on, where no collection says it (evaluate). "
        "Part of the fingerprint.",
    )
    model_threads: int = Field(0, ge=0, le=256, description="Threads of the model; 0: one for each processor.")
    weights_dir: Path | None = Field(None, description="Where weight files are looked for first; unset: the cache folder.")
    weights_sha256: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="sha256 of the weights, where the catalog does not know it (gl18_resnet50, sscd_resnet50, own). "
        "Part of the fingerprint.",
    )

    own_weights: str = Field("", description="Model own: its weights, a path, s3://bucket/key or an https address.")
    own_format: Literal["state_dict", "safetensors", "torchscript"] = Field(
        "state_dict", description="Model own: what that file is. TorchScript is a program: only from whom you trust."
    )
    own_network: Literal["resnet50", "efficientnet_lite0", "gl18_resnet50"] = Field(
        "resnet50", description="Model own: the network that a state dict or safetensors file holds the weights of."
    )
    own_dimension: int = Field(
        0, ge=0, le=32768, description="Model own: floats of a vector; 0: those of the network. TorchScript must be told."
    )
    own_input_pixels: int = Field(
        0, ge=0, le=2048, description="Model own: height and width of its input; 0: those of the network; TorchScript: 224."
    )
    own_mean: Numbers = Field(
        (), description="Model own: mean of red, green and blue, 0 to 255; empty: the network's; TorchScript: ImageNet's."
    )
    own_deviation: Numbers = Field((), description="Model own: deviation of red, green and blue, as the mean.")

    projection: str = Field(
        "",
        description="A projection by `image-search fit-projection`: a path, s3://bucket/key or an https address. Empty: none "
        "but the model's own. Part of the fingerprint.",
    )
    projection_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="sha256 of the projection's file.")
    projection_dimension: int = Field(0, ge=0, le=32768, description="Floats of a vector that the projection makes.")

    decode_workers: int = Field(0, ge=0, le=64, description="Decode processes; 0: one for each processor.")
    decode_timeout_seconds: float = Field(5.0, gt=0, description="Longest time to decode one picture.")
    decode_memory_mib: int = Field(1024, ge=256, description="Address space of a decode process.")
    max_object_bytes: int = Field(25 * 1024 * 1024, ge=1, description="Largest object that is read.")
    max_pixels: int = Field(50_000_000, ge=1, description="Most pixels of a picture, by its header.")
    min_side_pixels: int = Field(16, ge=1, description="Least width and height of a picture.")

    @model_validator(mode="after")
    def _three_colours(self) -> Self:
        if not {len(self.own_mean), len(self.own_deviation)} <= {0, 3}:
            raise ValueError("own_mean and own_deviation are three numbers each")
        if not all(0 < value <= 255 for value in self.own_deviation) or not all(0 <= value <= 255 for value in self.own_mean):
            raise ValueError("own_mean and own_deviation are on the scale of pixel values, 0 to 255; no deviation is 0")
        return self
