"""The model that the settings ask for: whose digest is known, whose must be said, and checkpoints of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import ConfigurationError
from infra.settings import ModelSettings, load
from processors.embedding.catalog import (
    CATALOG,
    IMAGENET_MEAN,
    BucketFile,
    FittedProjection,
    LocalFile,
    ModelDescription,
    Projection,
    Source,
    WebFile,
    fingerprint,
)
from processors.embedding.choice import chosen
from processors.embedding.model_cache import ConversionJob

DIGEST = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


def choose(**given: object) -> ModelDescription:
    return chosen(ModelSettings.model_validate(given))


def own(**given: object) -> ModelDescription:
    return choose(**{"model": "own", "own_weights": "/models/best.pth", "weights_sha256": DIGEST, **given})


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_a_row_whose_digest_is_known_needs_no_word_more(name: str) -> None:
    assert choose(model=name) == CATALOG[name]
    assert choose(model=name, weights_sha256=CATALOG[name].weights.sha256) == CATALOG[name]
    with pytest.raises(ConfigurationError, match="Unset it"):
        choose(model=name, weights_sha256=DIGEST)


@pytest.mark.parametrize("name", ["gl18_resnet50", "sscd_resnet50"])
def test_a_digest_that_nobody_published_is_the_operators_to_say(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        choose(model=name)
    source = CATALOG[name].weights.source
    assert isinstance(source, WebFile)
    for part in (CATALOG[name].weights.file_name, source.url, "sha256sum", "IMAGE_SEARCH_WEIGHTS_SHA256"):
        assert part in str(caught.value)
    row = choose(model=name, weights_sha256=DIGEST)
    assert row.weights.sha256 == DIGEST
    assert fingerprint(row, "fp32") != fingerprint(choose(model=name, weights_sha256=OTHER), "fp32")


@pytest.mark.parametrize("digest", ["abc", DIGEST.upper(), DIGEST + "0", f"sha256:{DIGEST}"])
def test_what_is_no_digest(digest: str) -> None:
    with pytest.raises(ConfigurationError, match="WEIGHTS_SHA256"):
        load(ModelSettings, weights_sha256=digest)


@pytest.mark.parametrize(
    ("place", "source", "file_name"),
    [
        ("/models/best.pth", LocalFile("/models/best.pth"), "best.pth"),
        ("models/best.pth", LocalFile("models/best.pth"), "best.pth"),
        ("s3://weights/runs/7/model.pth", BucketFile("weights", "runs/7/model.pth"), "01234567-model.pth"),
        ("https://h.example/a/model.pth?sig=x", WebFile("https://h.example/a/model.pth?sig=x"), "01234567-model.pth"),
        ("https://h.example", WebFile("https://h.example"), "01234567-weights"),
    ],
)
def test_where_a_checkpoint_of_ones_own_may_lie(place: str, source: Source, file_name: str) -> None:
    weights = own(own_weights=place).weights
    assert (weights.source, weights.file_name, weights.sha256) == (source, file_name, DIGEST)


@pytest.mark.parametrize("place", ["http://h.example/m.pth", "ftp://h.example/m.pth", "s3://bucket", "s3:///key", "https:///m"])
def test_other_places_are_refused(place: str) -> None:
    with pytest.raises(ConfigurationError, match="s3://bucket/key or an https address"):
        own(own_weights=place)


def test_it_is_its_network_with_other_weights() -> None:
    row = own()
    assert (row.name, row.network, row.dimension, row.mean) == ("own", "resnet50", 512, IMAGENET_MEAN)
    assert row.weights.form == "state_dict" and row.projection == CATALOG["resnet50"].projection
    assert own(own_network="efficientnet_lite0").dimension == 1280
    assert own(own_network="gl18_resnet50", own_dimension=2048).dimension == 2048
    assert own(own_format="safetensors").weights.form == "safetensors"
    assert own(own_input_pixels=288).input_size == (288, 288)
    other = own(own_mean="1,2,3.5", own_deviation="4,5,6")
    assert (other.mean, other.deviation) == ((1.0, 2.0, 3.5), (4.0, 5.0, 6.0))


def test_torchscript_only_when_it_is_asked_for_and_with_its_dimension() -> None:
    assert all(own(own_format=form).network != "torchscript" for form in ("state_dict", "safetensors"))
    with pytest.raises(ConfigurationError, match="OWN_DIMENSION"):
        own(own_format="torchscript")
    row = own(own_format="torchscript", own_dimension=256)
    assert (row.network, row.dimension, row.input_size, row.weights.form) == ("torchscript", 256, (224, 224), "torchscript")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"own_weights": ""}, "OWN_WEIGHTS"),
        ({"weights_sha256": ""}, "WEIGHTS_SHA256"),
        ({"own_dimension": 4096}, "at most 2048"),
        ({"own_network": "efficientnet_lite0", "own_dimension": 512}, "always 1280"),
        ({"model": "resnet50"}, "must be own and not resnet50"),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        own(**given)


@pytest.mark.parametrize("given", [{"own_mean": "1,2"}, {"own_deviation": "1,2,0"}, {"own_mean": "1,2,300"}, {"own_mean": "a"}])
def test_colours_that_are_none(given: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_"):
        load(ModelSettings, state_dir=Path("nowhere"), **given)


def test_two_checkpoints_of_ones_own_have_two_fingerprints() -> None:
    rows = [own(), own(weights_sha256=OTHER), own(own_dimension=256), own(own_input_pixels=256), own(own_mean="1,2,3")]
    rows += [own(own_network="gl18_resnet50"), own(own_format="torchscript", own_dimension=512)]
    assert len({fingerprint(row, "fp32") for row in rows}) == len(rows)
    assert fingerprint(own(own_weights="s3://b/k"), "fp32") == fingerprint(own(), "fp32")


@pytest.mark.parametrize("place", ["/models/best.pth", "s3://b/k", "https://h.example/m.pth"])
def test_it_reaches_the_converting_process_unchanged(place: str) -> None:
    row = own(own_weights=place)
    assert isinstance(row.projection, Projection)
    job = ConversionJob.model_validate(
        {"description": row, "precision": "fp32", "own_weights": None, "downloads": "d", "models": "m", "parent_pid": 1}
    )
    assert ConversionJob.model_validate_json(job.model_dump_json()).description == row


FITTED: dict[str, object] = {"projection": "/m/p.safetensors", "projection_sha256": OTHER, "projection_dimension": 256}


@pytest.mark.parametrize(("name", "columns"), [("efficientnet_lite0", 1280), ("resnet50", 2048), ("gl18_resnet50", 2048)])
def test_a_projection_takes_the_place_of_the_models_own(name: str, columns: int) -> None:
    plain = choose(model=name, weights_sha256="" if CATALOG[name].weights.sha256 else DIGEST)
    row = choose(model=name, weights_sha256=plain.weights.sha256, **FITTED)
    assert isinstance(row.projection, FittedProjection)
    assert (row.dimension, row.projection.columns, row.projection.file.sha256) == (256, columns, OTHER)
    assert row.weights == plain.weights and row.unprojected() == plain.unprojected()


def test_a_projection_of_ones_own_checkpoint() -> None:
    assert own(**FITTED).unprojected() == own().unprojected()
    script = own(own_format="torchscript", own_dimension=300, **FITTED)
    assert (script.dimension, script.unprojected().dimension) == (256, 300)


def test_a_projection_in_a_bucket_is_kept_under_a_name_with_its_digest() -> None:
    row = choose(**{**FITTED, "projection": "s3://models/a/p.safetensors"})
    assert isinstance(row.projection, FittedProjection)
    assert row.projection.file.source == BucketFile("models", "a/p.safetensors")
    assert row.projection.file.file_name == f"{OTHER[:8]}-p.safetensors"


@pytest.mark.parametrize("left_out", FITTED)
def test_half_a_projection_is_none(left_out: str) -> None:
    with pytest.raises(ConfigurationError, match="go together"):
        choose(**{name: value for name, value in FITTED.items() if name != left_out})


def test_what_no_projection_can_be() -> None:
    with pytest.raises(ConfigurationError, match="at most 1280 floats, not 1281"):
        choose(**{**FITTED, "projection_dimension": 1281})
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_PROJECTION is a path"):
        choose(**{**FITTED, "projection": "http://h.example/p"})
