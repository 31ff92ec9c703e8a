"""What is asked of reindexing, against what the worker's settings say of the model that it serves now."""

from __future__ import annotations

import pytest

from infra.settings import ProcessorSettings
from processors.embedding.catalog import FittedProjection, LocalFile
from processors.embedding.choice import chosen
from processors.model_changes import settings_of
from schemas.jobs import ReindexArguments

PROJECTED = ProcessorSettings(projection="/m/old.safetensors", projection_sha256="ab" * 32, projection_dimension=256)
OWN = ProcessorSettings(model="own", own_weights="/m/own.pth", weights_sha256="cd" * 32, own_network="gl18_resnet50")


def test_the_projection_that_is_asked_for_is_the_new_models() -> None:
    asked = ReindexArguments(
        model="efficientnet_lite0", projection="/m/new", projection_sha256="ef" * 32, projection_dimension=64
    )
    for settings in (ProcessorSettings(), PROJECTED):
        row = chosen(settings_of(asked, settings))
        assert isinstance(row.projection, FittedProjection) and row.dimension == 64
        assert (row.projection.file.source, row.projection.file.sha256) == (LocalFile("/m/new"), "ef" * 32)


def test_without_one_the_new_model_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("projection", "projection_sha256", "projection_dimension"):
        monkeypatch.setenv(f"IMAGE_SEARCH_{name.upper()}", str(getattr(PROJECTED, name)))
    for asked in ("efficientnet_lite0", "resnet50"):
        assert not isinstance(chosen(settings_of(ReindexArguments(model=asked), PROJECTED)).projection, FittedProjection)


def test_weights_of_ones_own_are_not_those_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_SEARCH_OWN_WEIGHTS", OWN.own_weights)
    monkeypatch.setenv("IMAGE_SEARCH_WEIGHTS_SHA256", OWN.weights_sha256)
    assert chosen(settings_of(ReindexArguments(model="efficientnet_lite0"), OWN)) == chosen(
        ProcessorSettings(own_weights="", weights_sha256="")
    )
    again = settings_of(ReindexArguments(model="own", own_weights="/m/newer.pth", weights_sha256="ef" * 32), OWN)
    assert (chosen(again).network, chosen(again).weights.source) == ("gl18_resnet50", LocalFile("/m/newer.pth"))
