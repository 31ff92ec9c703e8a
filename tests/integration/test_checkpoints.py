"""Files of weights in every form that is read, made here in the shape of the real ones, and files that are hostile.

No real weights of gl18_resnet50 and sscd_resnet50 were ever read here: nobody may download them. What is held is that a file
of their shape comes out as their makers' own code would compute it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision  # type: ignore[import-untyped]  # the package brings no types
from torch.nn import functional

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings
from processors.decode import decode
from processors.embedding import open_embedder
from processors.embedding.catalog import CATALOG, ModelDescription
from processors.embedding.choice import chosen
from processors.embedding.embedder import Pixels, Vectors
from tests.pictures import jpeg

FP32_COSINE = 0.9999
SAME = 1 - 1e-6

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def random_resnet50(seed: int, classes: int = 1000) -> torch.nn.Module:
    torch.manual_seed(seed)
    network: torch.nn.Module = torchvision.models.resnet50(num_classes=classes)
    return network.eval()


def gl18_file(path: Path, *, arrays_in_meta: bool, zipped: bool) -> dict[str, torch.Tensor]:
    """As cnnimageretrieval writes them: torch of that time knew no zip, and `meta` may hold NumPy arrays."""
    features = torch.nn.Sequential(*list(random_resnet50(5).children())[:-2])
    rows = torch.linalg.qr(torch.randn(2048, 2048, generator=torch.Generator().manual_seed(6)))[0]
    state = {f"features.{name}": values for name, values in features.state_dict().items()}
    state |= {"pool.p": torch.tensor([2.77]), "whiten.weight": rows, "whiten.bias": rows.sum(1) * 0.01}
    meta: dict[str, object] = {"architecture": "resnet50", "pooling": "gem", "whitening": True, "mean": [0.485, 0.456, 0.406]}
    if arrays_in_meta:
        meta["Lw"] = {"retrieval-SfM-120k": {"ss": {"m": np.zeros((4, 1)), "P": np.eye(4, dtype=np.float32)}}}
        meta["outputdim"] = np.float64(2048)
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    return state


class SscdShape(torch.nn.Module):
    """What a `sscd_disc_mixup.torchscript.pt` is a trace of, by its published source: ResNet50, GeM, a layer, unit length."""

    def __init__(self, dimension: int = 512) -> None:
        super().__init__()
        network = random_resnet50(7)
        self.features = torch.nn.Sequential(*list(network.children())[:-2])
        self.layer = torch.nn.Linear(2048, dimension)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        maps = self.features(planes)
        count, channels, height, width = maps.size()
        pooled = maps.reshape(count, channels, height * width).clamp(min=1e-6).pow(3.0).mean(dim=2).pow(1 / 3.0)
        return functional.normalize(self.layer(pooled))


def small_network(dimension: int) -> torch.nn.Module:
    torch.manual_seed(11)
    convolution = torch.nn.Conv2d(3, 16, 5, stride=4)
    pooling = (torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    return torch.nn.Sequential(convolution, *pooling, torch.nn.Linear(256, dimension))


def traced(network: torch.nn.Module, path: Path, side: int = 64) -> None:
    # With one picture, as most people trace: the file must still take eight.
    torch.jit.trace(network.eval(), torch.zeros(1, 3, side, side)).save(path)  # type: ignore[no-untyped-call]


def safetensors_file(path: Path, state: dict[str, torch.Tensor], **header: Any) -> None:
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    numbers = b""
    for name, values in state.items():
        part = values.contiguous().numpy().tobytes()
        offsets = [len(numbers), len(numbers) + len(part)]
        described[name] = {"dtype": names[values.dtype], "shape": list(values.shape), "data_offsets": offsets}
        numbers += part
    text = json.dumps(described | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settings_for(path: Path, cache: Path, **given: object) -> ProcessorSettings:
    own = {"model": "own", "own_weights": str(path), "weights_sha256": digest(path), "cache_dir": cache}
    return ProcessorSettings.model_validate({**own, "model_backend": "torch", **given})


async def vectors_of(settings: ProcessorSettings, pixels: Pixels) -> Vectors:
    embedder = await open_embedder(chosen(settings), settings)
    try:
        return await embedder.embed(pixels)
    finally:
        await embedder.close()


def pictures(row: ModelDescription) -> Pixels:
    rules = row.decode_rules(ProcessorSettings())
    return np.stack([decode(jpeg(seed), rules).pixels for seed in range(4)])


def planes(row: ModelDescription, pixels: Pixels) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize make them."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    return (scaled - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)


def least_cosine(first: Vectors, second: npt.NDArray[Any]) -> float:
    return float(np.sum(first.astype(np.float64) * second, axis=1).min())


@pytest.mark.parametrize(("arrays_in_meta", "zipped"), [(False, True), (True, False)])
async def test_a_file_of_gl18s_shape(tmp_path: Path, arrays_in_meta: bool, zipped: bool) -> None:
    """Against the formula of its own code: maps, GeM, unit length, whitening, unit length, the first 512, unit length."""
    row = CATALOG["gl18_resnet50"]
    path = tmp_path / row.weights.file_name
    state = gl18_file(path, arrays_in_meta=arrays_in_meta, zipped=zipped)
    features = torch.nn.Sequential(*list(random_resnet50(1).children())[:-2]).eval()
    features.load_state_dict(
        {name.removeprefix("features."): values for name, values in state.items() if name.startswith("features.")}
    )
    pixels = pictures(row)
    with torch.inference_mode():
        maps = features(planes(row, pixels))
        pooled = functional.avg_pool2d(maps.clamp(min=1e-6).pow(2.77), maps.shape[2:]).pow(1 / 2.77)[:, :, 0, 0]
        pooled = pooled / (pooled.norm(dim=1, keepdim=True) + 1e-6)
        white = functional.normalize(pooled @ state["whiten.weight"].T + state["whiten.bias"], dim=1)
        expected = functional.normalize(white[:, :512], dim=1).numpy()
    given = {"model": row.name, "weights_dir": tmp_path, "weights_sha256": digest(path), "cache_dir": tmp_path / "cache"}
    reference = await vectors_of(ProcessorSettings.model_validate({**given, "model_backend": "torch"}), pixels)
    assert reference.shape == (4, 512) and least_cosine(reference, expected) >= SAME
    assert least_cosine(np.roll(reference, 1, axis=0), expected) < FP32_COSINE, "or the pictures cannot be told apart"
    if not arrays_in_meta:
        served = await vectors_of(ProcessorSettings.model_validate(given), pixels)
        assert least_cosine(served, reference) >= FP32_COSINE


async def test_a_file_of_sscds_shape(tmp_path: Path) -> None:
    row = CATALOG["sscd_resnet50"]
    path = tmp_path / row.weights.file_name
    network = SscdShape().eval()
    traced(network, path)
    pixels = pictures(row)
    with torch.inference_mode():
        expected = network(planes(row, pixels)).numpy()
    given = {"model": row.name, "weights_dir": tmp_path, "weights_sha256": digest(path), "cache_dir": tmp_path / "cache"}
    reference = await vectors_of(ProcessorSettings.model_validate({**given, "model_backend": "torch"}), pixels)
    assert reference.shape == (4, 512) and least_cosine(reference, expected) >= SAME
    served = await vectors_of(ProcessorSettings.model_validate(given), pixels)
    assert least_cosine(served, reference) >= FP32_COSINE


async def test_one_resnet50_in_every_way_of_writing_it_down(tmp_path: Path) -> None:
    """Its own head of ten classes, as DataParallel names it, with the optimizer beside it, and as safetensors."""
    state = random_resnet50(9, classes=10).state_dict()
    files: dict[str, Callable[[Path], object]] = {
        "plain.pth": lambda path: torch.save(state, path),
        "training.pth": lambda path: torch.save({"epoch": 3, "model": state, "optimizer": {"lr": 0.1}}, path),
        "parallel.pth": lambda path: torch.save({f"module.{name}": values for name, values in state.items()}, path),
        "headless.pth": lambda path: torch.save({name: state[name] for name in state if not name.startswith("fc.")}, path),
        "plain.safetensors": lambda path: safetensors_file(path, state),
    }
    found: list[Vectors] = []
    for name, write in files.items():
        write(tmp_path / name)
        form = "safetensors" if name.endswith(".safetensors") else "state_dict"
        settings = settings_for(tmp_path / name, tmp_path, own_format=form, own_input_pixels=96)
        found.append(await vectors_of(settings, pictures(chosen(settings))))
    assert found[0].shape == (4, 512)
    assert all(np.array_equal(vectors, found[0]) for vectors in found)


async def test_a_checkpoint_of_ones_own_is_served_by_openvino(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    traced(small_network(96), path)
    wish = {"own_format": "torchscript", "own_dimension": 96, "own_input_pixels": 64}
    settings = settings_for(path, tmp_path, **wish)
    pixels = pictures(chosen(settings))
    reference = await vectors_of(settings, pixels)
    served = await vectors_of(settings_for(path, tmp_path, model_backend="openvino", **wish), pixels)
    assert served.shape == (4, 96) and least_cosine(served, reference) >= FP32_COSINE


class Bomb:
    """A pickle of it touches the witness when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def bomb_pickle(path: Path, witness: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(witness), protocol=2))


def bomb_beside_weights(path: Path, witness: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "meta": Bomb(witness)}, path)


def bomb_inside_an_array(path: Path, witness: Path) -> None:
    hidden = np.empty(1, dtype=object)
    hidden[0] = Bomb(witness)
    torch.save({"state_dict": {}, "meta": hidden}, path, _use_new_zipfile_serialization=False)


def bomb_inside_a_zip(path: Path, witness: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Bomb(witness), protocol=2))
        archive.writestr("x/version", "3\n")
        archive.writestr("x/constants.pkl", pickle.dumps(Bomb(witness), protocol=2))
        archive.writestr("x/code/evil.py", "import os\n")


BOMBS = [bomb_pickle, bomb_beside_weights, bomb_inside_an_array, bomb_inside_a_zip]


@pytest.mark.parametrize("form", ["state_dict", "safetensors", "torchscript"])
@pytest.mark.parametrize("write", BOMBS)
async def test_a_file_that_would_run_code_runs_nothing(tmp_path: Path, write: Callable[[Path, Path], None], form: str) -> None:
    witness, path = tmp_path / "ran", tmp_path / "weights.pth"
    write(path, witness)
    settings = settings_for(path, tmp_path, own_format=form, own_dimension=512)
    with pytest.raises(ConfigurationError, match=str(path)):
        await open_embedder(chosen(settings), settings)
    assert not witness.exists()
    pickle_of_it = pickle.dumps(Bomb(witness))
    pickle.loads(pickle_of_it)
    assert witness.exists(), "or the bomb is none"


async def test_nothing_of_a_file_with_another_digest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(random_resnet50(3).state_dict(), path)
    settings = settings_for(path, tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigurationError, match="its sha256 is"):
        await open_embedder(chosen(settings), settings)


async def test_torchscript_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    traced(small_network(512), path)
    settings = settings_for(path, tmp_path)
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_OWN_FORMAT=torchscript"):
        await open_embedder(chosen(settings), settings)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 96)),
            r"gives \(2, 96\) for two pictures, not \(2, 512\)",
        ),
        (torch.nn.Flatten(), r"gives \(2, 12288\)"),
        (torch.nn.Conv2d(7, 7, 1), "fails on two pictures"),
    ],
    ids=["another dimension", "no vectors", "no pictures"],
)
async def test_torchscript_that_does_something_else(tmp_path: Path, network: torch.nn.Module, says: str) -> None:
    path = tmp_path / "weights.pt"
    torch.jit.script(network).save(path)  # type: ignore[no-untyped-call]  # torch gives it no types
    settings = settings_for(path, tmp_path, own_format="torchscript", own_dimension=512, own_input_pixels=64)
    with pytest.raises(ConfigurationError, match=says):
        await open_embedder(chosen(settings), settings)


def whole(path: Path) -> None:
    safetensors_file(path, {"a": torch.zeros(2, 3)})


def changed_header(**header: object) -> Callable[[Path], None]:
    return lambda path: safetensors_file(path, {"a": torch.zeros(2, 3)}, **header)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "other tensors": whole,
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(struct.pack("<Q", 50) + b"{}"),
    "a header without end": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
    "no JSON": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}"),
    "no object": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "deep": lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "beyond the end": changed_header(a={"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 1 << 40]}),
    "backwards": changed_header(a={"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}),
    "negative": changed_header(a={"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}),
    "another size": changed_header(a={"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 24]}),
    "an unknown kind": changed_header(a={"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 24]}),
    "no tensor": changed_header(a=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_safetensors_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.safetensors"
    DAMAGE[damage](path)
    settings = settings_for(path, tmp_path, own_format="safetensors")
    with pytest.raises(ConfigurationError, match=str(path)):
        await open_embedder(chosen(settings), settings)


@pytest.mark.parametrize("network", ["resnet50", "efficientnet_lite0", "gl18_resnet50"])
async def test_weights_of_another_network(tmp_path: Path, network: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"pool.p": torch.tensor([0.0]), "conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    settings = settings_for(path, tmp_path, own_network=network)
    with pytest.raises(ConfigurationError, match=f"does not hold the weights of {network}"):
        await open_embedder(chosen(settings), settings)
