"""`image-search fit-projection` with the real model: fitted, served by both backends, evaluated, and in a collection."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from infra import cli, metadata_store, object_store, vector_store
from infra.errors import ConfigurationError
from infra.metadata_store.memory import MemoryMetadataStore
from infra.object_store.memory import MemoryObjectStore
from infra.settings import CommonSettings, ProcessorSettings
from infra.vector_store.memory import MemoryVectorStore
from processors.commands import upgrade_step
from processors.decode import Decoded, decode
from processors.embedding import check_golden, open_embedder
from processors.embedding.catalog import CATALOG, description_of, fingerprint
from processors.embedding.choice import chosen, projected
from processors.embedding.embedder import Vectors
from processors.embedding.open_models import OpenModels, model_of_row
from processors.embedding.projection_file import FittedMap, ProjectionFacts, read_any_projection, write_projection
from processors.embedding.weights import file_digest
from processors.model_changes import add_filling_model, settings_of
from processors.training.extraction import ModelUnderTest
from schemas.identity import ObjectRef
from schemas.jobs import ReindexArguments
from schemas.tables import ModelState
from tests.pictures import jpeg

LITE0 = "efficientnet_lite0"
PICTURES = 60
DIMENSION = 24
FP32_COSINE = 0.9999

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def commands() -> None:
    cli.add_service_commands()


def run(*arguments: str | Path) -> Result:
    """In this process: each new one imports for seconds."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.cli, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        (folder / f"{number:03}.jpg").write_bytes(jpeg(number, (160, 120)))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def fitted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the command says to set."""
    file = tmp_path_factory.mktemp("projection") / "small.safetensors"
    done = run("fit-projection", pictures, "--dimension", str(DIMENSION), "--output", file)
    assert done.exit_code == 0, done.stderr
    assert f"1280 to {DIMENSION} floats, fitted on {PICTURES} pictures, left out 1 × NOT_AN_IMAGE" in done.stderr
    assert "fewer pictures than the model has floats" in done.stderr
    assert f"models reindex {LITE0} --projection {file} --projection-sha256 {file_digest(file)} --projection-d" in done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def settings_for(fitted: dict[str, str], **more: object) -> ProcessorSettings:
    given = {name.removeprefix("IMAGE_SEARCH_").lower(): value for name, value in fitted.items()}
    return ProcessorSettings.model_validate({**given, **more})


async def vectors_of(settings: ProcessorSettings) -> Vectors:
    row = chosen(settings)
    embedder = await open_embedder(row, settings)
    try:
        await check_golden(embedder, row)
        rules = row.decode_rules(settings)
        vectors = await embedder.embed(np.stack([decode(jpeg(seed, (160, 120)), rules).pixels for seed in range(100, 108)]))
        assert embedder.dimension == vectors.shape[1] and embedder.fingerprint == fingerprint(row, "fp32")
    finally:
        await embedder.close()
    return vectors


async def test_both_backends_compute_what_the_file_says(fitted: dict[str, str]) -> None:
    plain = await vectors_of(ProcessorSettings(model_backend="torch"))
    fit = read_any_projection(Path(fitted["IMAGE_SEARCH_PROJECTION"]))
    expected = (plain - fit.mean) @ fit.matrix.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    reference = await vectors_of(settings_for(fitted, model_backend="torch"))
    assert reference.shape == (8, DIMENSION)
    assert np.allclose(np.linalg.norm(reference, axis=1), 1, atol=1e-5)
    assert np.sum(reference * expected, axis=1).min() > 1 - 1e-6
    served = await vectors_of(settings_for(fitted))
    assert np.sum(served * reference, axis=1).min() >= FP32_COSINE


Twins = tuple[MemoryMetadataStore, MemoryVectorStore]


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Twins:
    metadata, vectors = MemoryMetadataStore(), MemoryVectorStore()

    async def rows(_: CommonSettings) -> MemoryMetadataStore:
        return metadata

    async def collections(_: CommonSettings) -> MemoryVectorStore:
        return vectors

    monkeypatch.setattr(metadata_store, "connect", rows)
    monkeypatch.setattr(vector_store, "connect", collections)
    return metadata, vectors


async def test_upgrade_makes_a_collection_of_that_dimension(fitted: dict[str, str], twins: Twins) -> None:
    metadata, vectors = twins
    settings = settings_for(fitted)
    await upgrade_step(settings, print)
    (model,) = await metadata.models([ModelState.ACTIVE])
    assert (model.name, model.dimension) == (LITE0, DIMENSION)
    assert model.fingerprint == fingerprint(chosen(settings), "fp32") != fingerprint(CATALOG[LITE0], "fp32")
    await vectors.create_collection(model.collection, dimension=DIMENSION)
    with pytest.raises(ConfigurationError, match=f"has {DIMENSION} dimensions"):
        await vectors.create_collection(model.collection, dimension=1280)
    digest = fitted["IMAGE_SEARCH_PROJECTION_SHA256"]
    with pytest.raises(ConfigurationError, match=f"was made with.* and the projection whose sha256 is {digest}"):
        await upgrade_step(ProcessorSettings(), print)


def turned_round(file: Path, fitted: dict[str, str]) -> ProcessorSettings:
    """Settings that name another projection for the same model: the same one with its rows the other way round, and fewer."""
    known = read_any_projection(Path(fitted["IMAGE_SEARCH_PROJECTION"]))
    facts = known.facts.model_copy(update={"dimension": DIMENSION // 2})
    write_projection(file, FittedMap(facts, known.mean, known.matrix[::-1][: facts.dimension]))
    return ProcessorSettings(projection=str(file), projection_sha256=file_digest(file), projection_dimension=facts.dimension)


async def test_each_model_that_is_kept_is_opened_with_the_projection_of_its_row(
    fitted: dict[str, str], twins: Twins, tmp_path: Path
) -> None:
    """A change from the model without to the model with one, on a worker whose settings name a third."""
    metadata, vectors = twins
    await upgrade_step(ProcessorSettings(), print)
    other = turned_round(tmp_path / "other.safetensors", fitted)
    given = {name.removeprefix("IMAGE_SEARCH_").lower(): value for name, value in fitted.items()}
    asked = settings_of(ReindexArguments.model_validate({"model": LITE0, **given}), other)
    row = await add_filling_model(asked, metadata, vectors, ["images"], print)
    (active,) = await metadata.models([ModelState.ACTIVE])
    assert (row.state, row.name, row.dimension) == (ModelState.FILLING, active.name, DIMENSION)
    assert row.collection != active.collection and row.fingerprint == fingerprint(chosen(settings_for(fitted)), "fp32")
    stored = replace(row, description=json.loads(json.dumps(row.description)))
    assert description_of(stored) == chosen(asked) == chosen(settings_for(fitted))
    models = OpenModels(metadata, partial(model_of_row, settings=other))
    try:
        await models.start()
        await models.opened(row.fingerprint)
        async with models.in_use() as ((pool, plain), (same, filling)):
            files = [jpeg(seed, (160, 120)) for seed in range(200, 206)]
            decoded = [[one.pixels for one in await way.decode(files) if isinstance(one, Decoded)] for way in (pool, same)]
            without, found = await plain.embed(np.stack(decoded[0])), await filling.embed(np.stack(decoded[1]))
    finally:
        await models.close()
    assert filling.fingerprint == row.fingerprint and (without.shape, found.shape) == ((6, 1280), (6, DIMENSION))
    fit = read_any_projection(Path(fitted["IMAGE_SEARCH_PROJECTION"]))
    expected = (without - fit.mean) @ fit.matrix.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.sum(found * expected, axis=1).min() >= FP32_COSINE


async def test_a_model_whose_projection_is_gone_or_another_now_is_not_opened(
    fitted: dict[str, str], twins: Twins, tmp_path: Path
) -> None:
    """On a host that has not converted it yet."""
    metadata, _ = twins
    file = tmp_path / "p.safetensors"
    write_projection(file, read_any_projection(Path(fitted["IMAGE_SEARCH_PROJECTION"])))  # the same bytes
    await upgrade_step(settings_for({**fitted, "IMAGE_SEARCH_PROJECTION": str(file)}), print)
    (row,) = await metadata.models()
    elsewhere = ProcessorSettings(cache_dir=tmp_path / "cache")
    turned_round(file, fitted)
    with pytest.raises(ConfigurationError, match="its sha256 is"):
        async with model_of_row(row, elsewhere):
            pass
    file.unlink()
    with pytest.raises(ConfigurationError, match=r"IMAGE_SEARCH_PROJECTION: there is no file .*p\.safetensors"):
        async with model_of_row(row, elsewhere):
            pass


def test_a_bucket_gives_what_a_folder_gives(
    pictures: Path, fitted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryObjectStore()
    files = {file.name: file.read_bytes() for file in pictures.iterdir()}

    async def fill() -> None:
        await store.ensure_bucket("pictures")
        for name, data in files.items():
            await store.put(ObjectRef("pictures", f"all/{name}"), data)
        await store.put(ObjectRef("pictures", "other/100.jpg"), jpeg(100))
        await store.put(ObjectRef("pictures", "all/"), b"")

    async def connect(_: CommonSettings) -> MemoryObjectStore:
        return store

    asyncio.run(fill())
    monkeypatch.setattr(object_store, "connect", connect)
    done = run("fit-projection", "s3://pictures/all/", "--dimension", str(DIMENSION), "--output", tmp_path / "b.safetensors")
    assert done.exit_code == 0 and "left out 1 × NOT_AN_IMAGE" in done.stderr, done.stderr
    of_bucket = read_any_projection(tmp_path / "b.safetensors")
    of_folder = read_any_projection(Path(fitted["IMAGE_SEARCH_PROJECTION"]))
    assert of_bucket.facts == of_folder.facts
    assert np.allclose(of_bucket.mean, of_folder.mean, atol=1e-6)
    # Directions of nearly the same strength may turn a little.
    assert np.allclose(of_bucket.matrix @ of_folder.matrix.T, of_folder.matrix @ of_folder.matrix.T, atol=0.02)
    done = run("fit-projection", "s3://pictures", "--every", "3", "--dimension", "5", "--output", tmp_path / "b.safetensors")
    assert done.exit_code == 0 and read_any_projection(tmp_path / "b.safetensors").facts.pictures in (20, 21)


def test_evaluate_compares_it_with_the_model_without(pictures: Path, fitted: dict[str, str]) -> None:
    file = fitted["IMAGE_SEARCH_PROJECTION"]
    asked = ("evaluate", pictures, "--edit", "crop", "--edit", "jpeg", "--originals", "10", "--projection", file, "--json")
    done = run(*asked)
    assert done.exit_code == 0, done.stderr
    plain, projected_one = json.loads(done.stdout)["models"]
    assert (plain["label"], projected_one["label"]) == (LITE0, f"{LITE0}+small")
    assert projected_one["fingerprint"] == fingerprint(chosen(settings_for(fitted)), "fp32")
    assert plain["measures"] != projected_one["measures"]
    done = run(*asked, "--projection", file)
    assert done.exit_code == 2 and "two projections are called small" in done.stderr


def test_what_cannot_be_fitted_is_said_in_one_line(pictures: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "p.safetensors")
    for arguments, said in (
        ((pictures, "--dimension", PICTURES, *out), f"needs more than {PICTURES} pictures"),
        ((pictures, "--dimension", "1281", *out), "--dimension is 1 to 1280"),
        ((tmp_path / "nothing", *out), "is no folder, no file, and not s3://bucket"),
        (("s3://", *out), "is no folder, no file, and not s3://bucket"),
        ((pictures, "--output", tmp_path / "none" / "p"), "there is no folder"),
    ):
        done = run("fit-projection", *map(str, arguments))
        assert done.exit_code == 2 and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def changed(fitted: dict[str, str], tmp_path: Path) -> Path:
    file = tmp_path / "changed.safetensors"
    file.write_bytes(Path(fitted["IMAGE_SEARCH_PROJECTION"]).read_bytes()[:-1] + b"!")
    return file


async def test_a_file_that_was_changed_is_not_read(fitted: dict[str, str], changed: Path, tmp_path: Path) -> None:
    for backend in ("torch", "openvino"):
        given = {"projection": str(changed), "cache_dir": tmp_path / "cache", "model_backend": backend}
        with pytest.raises(ConfigurationError, match="its sha256 is"):
            await vectors_of(settings_for(fitted, **given))
        with pytest.raises(ConfigurationError, match=r"IMAGE_SEARCH_PROJECTION: there is no file .*gone"):
            await vectors_of(settings_for(fitted, **{**given, "projection": str(tmp_path / "gone")}))


@pytest.mark.parametrize("form", ["resnet50", "torchscript"])
async def test_a_checkpoint_of_ones_own_with_a_projection(tmp_path: Path, form: str) -> None:
    """ResNet50's shape with random weights, and a program: 2048 and 96 floats to 16."""
    torch.manual_seed(3)
    if form == "torchscript":
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 96, 7, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        torch.jit.script(network).save(tmp_path / "own.pth")  # type: ignore[no-untyped-call]  # torch gives it no types
        more: dict[str, object] = {"own_format": "torchscript", "own_dimension": 96}
    else:
        from torchvision.models import resnet50  # type: ignore[import-untyped]  # the package brings no types

        torch.save(resnet50().state_dict(), tmp_path / "own.pth")
        more = {}
    plain = ProcessorSettings.model_validate(
        {
            "model": "own",
            "own_weights": str(tmp_path / "own.pth"),
            "weights_sha256": file_digest(tmp_path / "own.pth"),
            "own_input_pixels": 64,
            "cache_dir": tmp_path,
            **more,
        }
    )
    parent = chosen(plain).unprojected()
    columns = parent.dimension
    assert columns == (96 if form == "torchscript" else 2048)
    facts = ProjectionFacts(
        parent=fingerprint(parent, "fp32"),
        model="own",
        columns=columns,
        dimension=16,
        pictures=99,
        whitening=1,
        shrinkage=0,
    )
    generator = np.random.default_rng(5)
    matrix = generator.standard_normal((16, columns)).astype(np.float32)
    write_projection(tmp_path / "p.safetensors", FittedMap(facts, np.full(columns, 0.01, dtype=np.float32), matrix))
    row = projected(chosen(plain), str(tmp_path / "p.safetensors"), file_digest(tmp_path / "p.safetensors"), 16)
    found = []
    pixels = np.stack([decode(jpeg(seed), row.decode_rules(plain)).pixels for seed in range(4)])
    for description, backend in ((parent, "torch"), (row, "torch"), (row, "openvino")):
        model = ModelUnderTest("", description, plain.model_copy(update={"model_backend": backend}))
        embedder = await open_embedder(model.description, model.settings)
        found.append(await embedder.embed(pixels))
        await embedder.close()
    expected = (found[0] - 0.01) @ matrix.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.sum(found[1] * expected, axis=1).min() > 1 - 1e-5
    assert np.sum(found[2] * found[1], axis=1).min() >= FP32_COSINE
    other = replace(row, mean=(1.0, 2.0, 3.0))
    with pytest.raises(ConfigurationError, match="was fitted on vectors of another model"):
        await open_embedder(other, plain.model_copy(update={"model_backend": "torch"}))
