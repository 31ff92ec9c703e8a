"""A collection in int8 beside another one: settled when it is begun, gone on with, calibrated anew, opened as its row says."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from infra.errors import ConfigurationError
from infra.metadata_store.interface import ModelRow
from infra.metadata_store.memory import MemoryMetadataStore
from infra.model_table import ModelChangeRefused
from infra.settings import ProcessorSettings
from infra.vector_store.memory import MemoryVectorStore
from processors.embedding import host
from processors.embedding.catalog import CATALOG, fingerprint
from processors.embedding.open_models import model_of_row
from processors.model_changes import add_filling_model, drop, settings_of
from schemas.identity import ModelFingerprint
from schemas.jobs import ReindexArguments
from schemas.tables import ModelState
from tests.pictures import jpeg

LITE0 = CATALOG["efficientnet_lite0"]
FIRST = ModelRow(
    fingerprint=fingerprint(LITE0, "fp32"),
    name=LITE0.name,
    collection="first",
    dimension=LITE0.dimension,
    backend="openvino",
    precision="fp32",
    description=asdict(LITE0),
    state=ModelState.ACTIVE,
    created_at_us=1,
)


@pytest.fixture(autouse=True)
def int8_host() -> None:
    try:
        host.check_precision("int8")
    except ConfigurationError:
        pytest.skip("the processor of this host has no VNNI")


class Deployed:
    """The stores, the folder that is calibrated on, and the worker that takes the job."""

    def __init__(self, folder: Path) -> None:
        self.metadata, self.vectors = MemoryMetadataStore(), MemoryVectorStore()
        self.pictures = folder / "pictures"
        self.settings = ProcessorSettings.model_validate(
            {"cache_dir": folder / "cache", "calibration_dir": self.pictures, "decode_workers": 1}
        )
        self.said: list[str] = []

    async def start(self) -> Deployed:
        self.pictures.mkdir(parents=True)
        for seed in range(34):
            (self.pictures / f"{seed}.jpg").write_bytes(jpeg(2000 + seed, (160, 120)))
        await self.vectors.create_collection(FIRST.collection, dimension=FIRST.dimension)
        await self.metadata.add_model(FIRST)
        return self

    async def reindex(self, **asked: str) -> ModelRow:
        self.said.clear()
        settings = settings_of(ReindexArguments.model_validate({"model": LITE0.name, **asked}), self.settings)
        return await add_filling_model(settings, self.metadata, self.vectors, [], self.said.append)

    async def activate(self, new: ModelFingerprint, old: ModelFingerprint) -> None:
        moves = {old: (ModelState.ACTIVE, ModelState.PREVIOUS), new: (ModelState.FILLING, ModelState.ACTIVE)}
        assert await self.metadata.move_models(moves)

    @property
    def is_calibrated_again(self) -> bool:
        return any(line.startswith("int8 is calibrated on") for line in self.said)


@pytest.fixture
async def deployed(tmp_path: Path) -> Deployed:
    return await Deployed(tmp_path).start()


async def test_what_was_begun_is_gone_on_with_and_the_same_model_can_be_calibrated_anew(deployed: Deployed) -> None:
    begun = await deployed.reindex(model_precision="int8")
    assert (begun.precision, begun.state) == ("int8", ModelState.FILLING) and deployed.is_calibrated_again
    assert begun.fingerprint != FIRST.fingerprint and await deployed.vectors.has_collection(begun.collection)

    # A worker died, pictures came, another worker takes over: the collection that fills stays the one that fills.
    shutil.copy(deployed.pictures / "0.jpg", deployed.pictures / "another.jpg")
    assert await deployed.reindex(model_precision="int8") == begun and deployed.said == []
    assert await deployed.reindex(model_precision="auto") == begun

    await deployed.activate(begun.fingerprint, FIRST.fingerprint)
    anew = await deployed.reindex(model_precision="int8")
    assert anew.fingerprint not in (begun.fingerprint, FIRST.fingerprint) and deployed.is_calibrated_again
    assert [row.state for row in await deployed.metadata.models([ModelState.FILLING])] == [ModelState.FILLING]

    # What was settled is dropped: it is settled again, by the pictures as they are.
    await drop(anew.fingerprint, deployed.metadata, deployed.vectors, sleep=_no_wait)
    (deployed.pictures / "another.jpg").unlink()
    with pytest.raises(ModelChangeRefused, match="is the active model"):
        await deployed.reindex(model_precision="int8")


async def _no_wait(_seconds: float) -> None:
    return


async def test_auto_measures_for_each_new_collection_and_a_digest_that_is_said_is_taken(
    deployed: Deployed, tmp_path: Path
) -> None:
    chosen = await deployed.reindex(model_precision="auto")
    [line] = [line for line in deployed.said if "<- chosen" in line]
    assert line.split()[0] == chosen.precision == "int8", "int8 is more than twice as fast where there is VNNI"
    digest = str(chosen.description["calibration"])

    elsewhere = await Deployed(tmp_path / "elsewhere").start()
    elsewhere.settings = elsewhere.settings.model_copy(update={"cache_dir": deployed.settings.cache_dir})
    assert (await elsewhere.reindex(model_precision="int8", calibration_sha256=digest)).fingerprint == chosen.fingerprint
    assert elsewhere.said == []
    with pytest.raises(ConfigurationError, match="copy eeee"):
        await elsewhere.reindex(model_precision="int8", calibration_sha256="e" * 64)


async def test_a_row_is_opened_as_it_says_whatever_the_settings_say(deployed: Deployed) -> None:
    in_int8 = await deployed.reindex(model_precision="int8")
    for asked in ("auto", "fp32", "int8"):
        # Pictures that another model was calibrated on are in the settings of this process.
        own = {"model": "resnet50", "model_precision": asked, "calibration_sha256": "f" * 64}
        vectors = {}
        for row in (FIRST, in_int8):
            async with model_of_row(row, deployed.settings.model_copy(update=own)) as (decoder, embedder):
                assert embedder.fingerprint == row.fingerprint
                [outcome] = await decoder.decode([jpeg(5)])
                assert not isinstance(outcome, Exception)
                vectors[row.precision] = (await embedder.embed(outcome.pixels[None]))[0]
        assert 0.95 < float(np.dot(vectors["fp32"], vectors["int8"])) < 0.9999
