"""What a fingerprint covers, and what it must not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from infra.errors import ConfigurationError
from infra.settings import ModelSettings
from processors.embedding import catalog
from processors.embedding.catalog import (
    CATALOG,
    BucketFile,
    FittedProjection,
    LocalFile,
    ModelDescription,
    Projection,
    Source,
    TorchvisionFile,
    WebFile,
    Weights,
    find,
    fingerprint,
)
from processors.embedding.golden_check import golden_picture, golden_vectors
from processors.embedding.model_cache import ConversionJob

ROW = CATALOG["resnet50"]

CHANGES_A_VECTOR: dict[str, object] = {
    "name": "other",
    "network": "efficientnet_lite0",
    "dimension": 256,
    "input_size": (224, 225),
    "mean": (1.0, 2.0, 3.0),
    "deviation": (1.0, 2.0, 3.0),
    "gem_power": 1.0,
    "projection": Projection("other", 2048),
    "weights": replace(ROW.weights, sha256="0" * 64),
}
CHANGES_NO_VECTOR: dict[str, object] = {
    "precisions": ("fp32", "fp32"),
    # But of int8: test_embedding_fastest.py.
    "calibration": "e" * 64,
}


def test_every_field_of_a_row_is_known_to_change_vectors_or_not() -> None:
    assert {field.name for field in fields(ModelDescription)} == CHANGES_A_VECTOR.keys() | CHANGES_NO_VECTOR.keys()


@pytest.mark.parametrize("name", CHANGES_A_VECTOR)
def test_what_changes_a_vector_changes_the_fingerprint(name: str) -> None:
    changed = replace(ROW, **{name: CHANGES_A_VECTOR[name]})  # type: ignore[arg-type]  # any field, by name
    assert fingerprint(changed, "fp32") != fingerprint(ROW, "fp32")


def fitted_on(row: ModelDescription, file_name: str = "p.safetensors", sha256: str = "12" * 32) -> ModelDescription:
    file = replace(row.weights, file_name=file_name, sha256=sha256, source=LocalFile(f"/m/{file_name}"), form="safetensors")
    return replace(row.unprojected(), projection=FittedProjection(file, row.unprojected().dimension), dimension=64)


@pytest.mark.parametrize("row", CATALOG.values(), ids=list(CATALOG))
def test_a_fitted_projection_changes_the_fingerprint_by_what_is_in_its_file(row: ModelDescription) -> None:
    row = replace(row, weights=replace(row.weights, sha256="ab" * 32))
    labels = {
        fingerprint(one, "fp32")
        for one in (row, fitted_on(row), fitted_on(row, sha256="34" * 32), fitted_on(row, "q", "12" * 32))
    }
    assert len(labels) == 3, "where the file lies is no part of it"
    assert fitted_on(fitted_on(row)) == fitted_on(row) and fitted_on(row).unprojected() == row.unprojected()


@pytest.mark.parametrize("name", CHANGES_NO_VECTOR)
def test_what_changes_no_vector_does_not(name: str) -> None:
    changed = replace(ROW, **{name: CHANGES_NO_VECTOR[name]})  # type: ignore[arg-type]  # any field, by name
    assert fingerprint(changed, "fp32") == fingerprint(ROW, "fp32")


def test_where_the_weights_come_from_changes_nothing() -> None:
    sources: list[Source] = [TorchvisionFile("x"), WebFile("https://x/y"), BucketFile("b", "k"), LocalFile("p")]
    for source in sources:
        elsewhere = Weights(file_name="x", sha256=ROW.weights.sha256, source=source, licence="x", form="safetensors")
        assert fingerprint(replace(ROW, weights=elsewhere), "fp32") == fingerprint(ROW, "fp32")


def test_the_decode_rule_and_the_pooling_floor_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(ROW, "fp32")
    monkeypatch.setattr(catalog, "SCALING_RULE", "another/1")
    changed = fingerprint(ROW, "fp32")
    monkeypatch.setattr(catalog, "GEM_FLOOR", 1e-3)
    assert len({before, changed, fingerprint(ROW, "fp32")}) == 3


def test_fingerprints_stay_what_they_are() -> None:
    """A changed value here means that every collection out there has to be made anew: raise SCALING_RULE knowingly."""
    rows = {
        name: replace(row, weights=replace(row.weights, sha256=row.weights.sha256 or "ab" * 32))
        for name, row in CATALOG.items()
    }
    assert {name: fingerprint(row, "fp32")[:16] for name, row in rows.items()} == {
        "efficientnet_lite0": "164de2c365343733",
        "resnet50": "95157031cbf039de",
        "gl18_resnet50": "6e7c985e53ff0f9c",
        "sscd_resnet50": "ae86408eb8922f47",
    }


def test_weights_that_nobody_vouched_for_have_no_fingerprint() -> None:
    for name in ("gl18_resnet50", "sscd_resnet50"):
        with pytest.raises(ConfigurationError, match="WEIGHTS_SHA256"):
            fingerprint(CATALOG[name], "fp32")


def test_the_default_model_is_in_the_catalog() -> None:
    assert find(ModelSettings().model).name == "efficientnet_lite0"


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="efficientnet_lite0, resnet50, gl18_resnet50, sscd_resnet50, or own"):
        find("resnet51")


def test_a_precision_that_the_model_does_not_come_in() -> None:
    with pytest.raises(ConfigurationError, match="MODEL_PRECISION"):
        fingerprint(replace(ROW, precisions=()), "fp32")


def test_rows_have_digests_and_names() -> None:
    for name, row in CATALOG.items():
        assert name == row.name and row.weights.licence
        assert len(bytes.fromhex(row.weights.sha256)) == (0 if name in ("gl18_resnet50", "sscd_resnet50") else 32)
    assert CATALOG["resnet50"].weights.sha256[:8] in CATALOG["resnet50"].weights.file_name


def test_decode_rules_take_size_from_the_row_and_limits_from_the_settings() -> None:
    rules = ROW.decode_rules(ModelSettings(max_pixels=77, min_side_pixels=5))
    assert (rules.height, rules.width, rules.max_pixels, rules.min_side) == (224, 224, 77, 5)


@pytest.mark.parametrize("row", [*CATALOG.values(), fitted_on(ROW)], ids=[*CATALOG, "fitted"])
def test_a_row_reaches_the_converting_process_unchanged(row: ModelDescription) -> None:
    job = ConversionJob.model_validate(
        {"description": row, "precision": "fp32", "own_weights": None, "downloads": "d", "models": "m", "parent_pid": 1}
    )
    assert ConversionJob.model_validate_json(job.model_dump_json()).description == row


def test_golden_vectors_are_of_the_row_as_it_stands() -> None:
    row = CATALOG["efficientnet_lite0"]
    golden = golden_vectors(row)
    assert golden is not None and golden.fingerprint == fingerprint(row, "fp32")
    assert len(golden.vectors) == 2
    for name, vector in golden.vectors.items():
        assert len(vector) == row.dimension and abs(sum(value**2 for value in vector) - 1) < 1e-4
        assert golden_picture(name)


def test_a_model_without_golden_vectors() -> None:
    assert golden_vectors(CATALOG["resnet50"]) is None
