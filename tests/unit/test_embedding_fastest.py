"""Which precision `auto` becomes, and what later starts take from the collection."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from infra.errors import ConfigurationError
from infra.metadata_store.interface import ModelRow
from infra.metadata_store.memory import MemoryMetadataStore
from infra.settings import ModelSettings
from processors.embedding.active_model import active_model, settled, settled_by
from processors.embedding.catalog import CATALOG, ModelDescription, fingerprint, precision_of
from processors.embedding.choice import chosen, precision_asked
from processors.embedding.fastest import Measured, choose
from schemas.tables import ModelState

DIGEST = "c" * 64
LITE0 = replace(CATALOG["efficientnet_lite0"], calibration=DIGEST)


def test_the_fastest_is_chosen() -> None:
    assert choose([Measured("fp32", 40.0), Measured("bf16", 90.0), Measured("int8", 200.0)]).precision == "int8"
    assert choose([Measured("fp32", 40.0), Measured("bf16", 90.0), Measured("int8", 60.0)]).precision == "bf16"


def test_what_is_about_as_fast_does_not_replace_what_is_more_exact() -> None:
    assert choose([Measured("fp32", 100.0), Measured("int8", 109.0)]).precision == "fp32"
    assert choose([Measured("fp32", 100.0), Measured("bf16", 105.0), Measured("int8", 112.0)]).precision == "int8"


def test_what_does_not_run_here_is_not_chosen() -> None:
    refused = Measured("int8", why_not="no VNNI")
    assert choose([Measured("fp32", 1.0), refused]).precision == "fp32"
    assert choose([replace(refused, precision="fp32"), Measured("bf16", 1.0)]).precision == "bf16"
    with pytest.raises(ConfigurationError, match="fp32: broken; int8: no VNNI"):
        choose([Measured("fp32", why_not="broken"), refused])


def test_the_pictures_it_is_calibrated_on_are_part_of_the_fingerprint_of_int8_alone() -> None:
    plain, other = CATALOG["efficientnet_lite0"], replace(LITE0, calibration="d" * 64)
    assert fingerprint(plain, "fp32") == fingerprint(LITE0, "fp32")
    assert len({fingerprint(LITE0, "fp32"), fingerprint(LITE0, "int8"), fingerprint(other, "int8")}) == 3
    # A changed value here means that every collection in int8 has to be made anew: raise QUANTIZATION_RULE knowingly.
    assert fingerprint(LITE0, "int8")[:16] == "9ea8252c66fbc0dd"
    assert precision_of(LITE0, fingerprint(LITE0, "int8")) == "int8"
    assert precision_of(plain, fingerprint(plain, "fp32")) == "fp32"
    assert precision_of(plain, fingerprint(LITE0, "int8")) is None
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_CALIBRATION_SHA256"):
        fingerprint(plain, "int8")


def made_in_int8(description: ModelDescription = LITE0, state: ModelState = ModelState.ACTIVE) -> ModelRow:
    return ModelRow(
        fingerprint=fingerprint(description, "int8"),
        name=description.name,
        collection="images",
        dimension=description.dimension,
        backend="openvino",
        precision="int8",
        description=asdict(description),
        state=state,
        created_at_us=1,
    )


@pytest.mark.parametrize("asked", ["auto", "int8"])
async def test_later_starts_take_from_the_collection_what_was_settled_when_it_was_made(asked: str) -> None:
    metadata = MemoryMetadataStore()
    settings = ModelSettings.model_validate({"model_precision": asked})
    with pytest.raises(ConfigurationError, match="image-search upgrade"):
        await settled(settings, metadata)
    await metadata.add_model(made_in_int8())
    found = await settled(settings, metadata)
    assert precision_asked(found) == "int8" and found.calibration_sha256 == DIGEST
    assert fingerprint(chosen(found), precision_asked(found)) == made_in_int8().fingerprint


async def test_a_precision_or_pictures_that_are_named_are_not_replaced() -> None:
    metadata = MemoryMetadataStore()
    await metadata.add_model(made_in_int8())
    assert precision_asked(await settled(ModelSettings(model_precision="fp32"), metadata)) == "fp32"
    named = ModelSettings(model_precision="int8", calibration_sha256="d" * 64)
    assert (await settled(named, metadata)).calibration_sha256 == "d" * 64


def test_of_several_models_the_one_that_the_settings_name_settles_them_and_the_active_one_first() -> None:
    active = made_in_int8()
    filling = replace(made_in_int8(replace(LITE0, calibration="d" * 64), ModelState.FILLING), created_at_us=2)
    other = made_in_int8(replace(CATALOG["resnet50"], calibration=DIGEST))
    auto = ModelSettings(model_precision="auto")
    found = settled_by(auto, [filling, active])
    assert found is not None and found.calibration_sha256 == DIGEST
    found = settled_by(auto, [other, replace(active, state=ModelState.PREVIOUS), filling])
    assert found is not None and (found.model_precision, found.calibration_sha256) == ("int8", "d" * 64)
    assert settled_by(auto, [other]) is None
    assert settled_by(ModelSettings(model_precision="fp32"), [active]) is None
    assert settled_by(ModelSettings(model_precision="int8", calibration_sha256="d" * 64), [active]) is None


async def test_of_two_checkpoints_of_ones_own_each_is_settled_by_its_own_collection() -> None:
    """They share a name. Who takes the other's calibration opens neither."""
    metadata = MemoryMetadataStore()
    asked = {
        weights: ModelSettings.model_validate(
            {"model": "own", "own_weights": f"/{weights}.pth", "weights_sha256": weights * 64, "model_precision": "int8"}
        )
        for weights in ("1", "2")
    }
    rows = {}
    for weights, state in (("1", ModelState.PREVIOUS), ("2", ModelState.ACTIVE)):
        rows[weights] = made_in_int8(replace(chosen(asked[weights]), calibration=weights * 64), state)
        await metadata.add_model(rows[weights])
    for weights, settings in asked.items():
        found = await settled(settings, metadata)
        assert found.calibration_sha256 == weights * 64
        assert fingerprint(chosen(found), precision_asked(found)) == rows[weights].fingerprint


@pytest.mark.parametrize("precision", ["auto", "int8"])
async def test_who_asks_for_a_model_that_was_never_set_up_is_told_so(precision: str) -> None:
    metadata = MemoryMetadataStore()
    await metadata.add_model(made_in_int8())
    settings = ModelSettings.model_validate({"model": "resnet50", "model_precision": precision})
    with pytest.raises(ConfigurationError, match="image-search models reindex"):
        found = await settled(settings, metadata)
        await active_model(metadata, fingerprint(chosen(found), precision_asked(found)), found.model)


def test_auto_alone_names_no_model() -> None:
    with pytest.raises(ConfigurationError, match="auto is settled when the collection is made"):
        precision_asked(ModelSettings(model_precision="auto"))
