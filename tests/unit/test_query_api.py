"""The contract in words: parameters, error codes, and an OpenAPI document with everything in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from infra.errors import ImageRejected, StoreRefused, StoreUnavailable
from infra.settings import QuerySettings
from query_service.app import ENDPOINTS, init_app
from query_service.endpoint import parse, unique
from query_service.errors import RequestRefused, refusal_of
from query_service.openapi import document
from schemas.api import (
    FILTER_EXAMPLES,
    ErrorCode,
    EventParameters,
    ImageParameters,
    ListParameters,
    SearchParameters,
    SimilarParameters,
    time_of_us,
)
from schemas.events import OutcomeType, ReasonCode
from schemas.filter import Filter

OPENAPI: dict[str, Any] = json.loads(document(ENDPOINTS, largest_limit=500))


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (SearchParameters, "limit", "0"),
        (SearchParameters, "limit", "1001"),
        (SearchParameters, "limit", "abc"),
        (SearchParameters, "limit", ""),
        (SearchParameters, "min_score", "nan"),
        (SearchParameters, "min_score", "inf"),
        (SearchParameters, "min_score", "101"),
        (SearchParameters, "bucket", "No Such/Bucket"),
        (SearchParameters, "bucket", ""),
        (SearchParameters, "prefix", "a\0b"),
        (SearchParameters, "prefix", "x" * 1025),
        (SearchParameters, "wait_for", "x" * 400),
        (SearchParameters, "lmit", "5"),
        (SimilarParameters, "wait_for", "x"),
        (ImageParameters, "limit", "5"),
        (ListParameters, "state", "lost"),
        (ListParameters, "cursor", "x" * 5000),
        (EventParameters, "type", "exploded"),
        (EventParameters, "follow", "perhaps"),
    ],
)
def test_a_wrong_parameter_is_named(model: type[BaseModel], name: str, value: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse(model, {name: value})
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert [problem["parameter"] for problem in refused.value.details["parameters"]] == [name]


@given(st.text(min_size=20), st.sampled_from(["limit", "min_score", "type"]))
def test_what_was_sent_is_not_echoed(value: str, name: str) -> None:
    model = EventParameters if name == "type" else SearchParameters
    with pytest.raises(RequestRefused) as refused:
        parse(model, {name: f"<{value}>"})
    assert value not in json.dumps(refused.value.details, ensure_ascii=False)


def test_parameters_mean_what_they_say() -> None:
    parameters = parse(SearchParameters, {"limit": "7", "min_score": "-3.5", "bucket": "images", "prefix": "a b/ä%"})
    assert (parameters.limit, parameters.min_score, parameters.narrow) == (7, -3.5, Filter("images", "a b/ä%"))
    assert parse(EventParameters, {"type": "indexed,image-search.image.failed"}).type == {
        OutcomeType.INDEXED,
        OutcomeType.FAILED,
    }
    assert parse(EventParameters, {"follow": "false"}).follow is False


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(RequestRefused):
        unique([("limit", "1"), ("limit", "2")])


def test_every_code_has_a_fitting_status() -> None:
    assert all(400 <= code.status <= 599 for code in ErrorCode)


@pytest.mark.parametrize("reason", [reason for reason in ReasonCode if reason.value in ErrorCode.__members__])
def test_a_rejected_picture_keeps_its_reason(reason: ReasonCode) -> None:
    refusal = refusal_of(ImageRejected(reason, "told to people"))
    assert (refusal.code, refusal.message) == (reason.value, "told to people")


def test_stores_that_are_away_answer_503_and_when_to_come_back() -> None:
    away = refusal_of(StoreUnavailable("vector store", "grpc: secret-host:19530 refused"))
    assert (away.code.status, away.code) == (503, ErrorCode.STORE_UNAVAILABLE)
    assert "Retry-After" in away.headers
    assert "secret-host" not in away.message
    refused = refusal_of(StoreRefused(ReasonCode.ACCESS_DENIED, "AccessDenied for key AKIA..."))
    assert refused.code is ErrorCode.STORE_REFUSED
    assert "AKIA" not in refused.message


def test_what_nobody_foresaw_says_nothing_outside() -> None:
    refusal = refusal_of(RuntimeError("Traceback: /srv/secret.py"))
    assert refusal.code is ErrorCode.INTERNAL_ERROR
    assert "secret" not in refusal.message


@given(st.integers(0, 253402300799_999_999))
def test_times_keep_their_microseconds(microseconds: int) -> None:
    moment = time_of_us(microseconds)
    assert round(moment.timestamp()) == pytest.approx(microseconds / 1_000_000, abs=1)
    assert moment.microsecond == microseconds % 1_000_000


def test_every_code_is_documented_with_its_status() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    documented = re.findall(r"^\| (\d{3}) \| `([A-Z_]+)` \|", page, re.MULTILINE)
    assert sorted(documented) == sorted((str(code.status), code.value) for code in ErrorCode)


# -- OpenAPI -----------------------------------------------------------------------------------------------------------
def test_every_route_is_in_the_document_and_nothing_else() -> None:
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in init_app(QuerySettings()).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {(method, path) for path, operations in OPENAPI["paths"].items() for method in operations}
    assert routes == described


def test_every_reference_leads_somewhere() -> None:
    references = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(OPENAPI))
    assert references
    assert set(references) <= OPENAPI["components"]["schemas"].keys()
    assert "$defs" not in json.dumps(OPENAPI)


def test_every_parameter_is_described_with_its_bounds() -> None:
    parameters = OPENAPI["paths"]["/v1/search"]["post"]["parameters"]
    search = {parameter["name"]: parameter.get("schema") for parameter in parameters}
    assert search.keys() == {
        *("limit", "offset", "min_score", "max_distance", "bucket", "prefix", "filter", "wait_for"),
        *("box", "group_by", "include", "model"),
    }
    assert (search["limit"]["minimum"], search["limit"]["maximum"], search["limit"]["type"]) == (1, 500, "integer")
    similar = OPENAPI["paths"]["/v1/images/{id}/similar"]["get"]["parameters"]
    assert {parameter["name"]: parameter["in"] for parameter in similar}["id"] == "path"


def test_a_filter_is_described_as_json_with_examples() -> None:
    reference = {"$ref": "#/components/schemas/FilterGroup"}
    for method, path in (("post", "/v1/search"), ("get", "/v1/images"), ("get", "/v1/images/{id}/similar")):
        parameters = {parameter["name"]: parameter for parameter in OPENAPI["paths"][path][method]["parameters"]}
        written = parameters["filter"]["content"]["application/json"]
        assert written["schema"] == reference
        assert [example["value"] for example in written["examples"].values()] == FILTER_EXAMPLES
    form = OPENAPI["paths"]["/v1/search"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["properties"]["filter"] == reference
    assert form["encoding"]["filter"] == {"contentType": "application/json"}
    assert OPENAPI["components"]["schemas"]["FilterGroup"]["properties"]["must"]["minItems"] == 1


def test_every_error_code_of_an_endpoint_is_under_its_status() -> None:
    for endpoint in ENDPOINTS:
        answers = OPENAPI["paths"][endpoint.path][endpoint.method.lower()]["responses"]
        for code in endpoint.errors:
            assert code in answers[str(code.status)]["description"]


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for path in OPENAPI["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))
