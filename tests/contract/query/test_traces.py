"""A request is a span of the caller's trace, a search's steps lie below it, and the log has its trace beside its request."""

from __future__ import annotations

import pytest
from opentelemetry.trace import SpanKind, StatusCode
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from infra.errors import StoreUnavailable
from infra.telemetry import add_trace_id
from query_service.middlewares import REQUEST_ID_HEADER
from schemas.api import ErrorCode
from schemas.topics import HEADER_TRACE_PARENT
from tests.query_http import Client, refused
from tests.query_world import QueryWorld, picture
from tests.spans import recorded_spans, trace_id

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_search_is_part_of_its_callers_trace(world: QueryWorld, client: Client) -> None:
    await world.put("a.jpg", 0)
    with recorded_spans() as spans:
        headers = {HEADER_TRACE_PARENT: CALLER, REQUEST_ID_HEADER: "mine"}
        await client.post("/v1/search", data=picture(0), headers=headers)
    request = spans.one("POST /v1/search")
    assert (trace_id(request), request.kind) == (CALLER.split("-")[1], SpanKind.SERVER)
    assert spans.below(request) == ["decode", "embed", "search", "metadata"]
    assert request.attributes is not None
    assert {name: request.attributes[name] for name in ("http.route", "http.response.status_code")} == {
        "http.route": "/v1/search",
        "http.response.status_code": 200,
    }
    assert request.attributes["image_search.request_id"] == "mine"


async def test_a_request_without_a_trace_begins_one_named_by_its_pattern(world: QueryWorld, client: Client) -> None:
    row = await world.put("a.jpg", 0)
    with recorded_spans() as spans:
        await client.get(f"/v1/images/{row.object_id.hex()}")
        await client.get("/no/such/path")
        for path in ("/metrics", "/healthz/live", "/healthz/ready", "/v1/status"):
            await client.get(path)
    assert [span.name for span in spans.all()] == ["GET /v1/images/{id}", "GET unknown"], "probes and monitoring are left out"
    assert all(span.parent is None and span.status.status_code is StatusCode.UNSET for span in spans.all())


async def test_a_fault_of_ours_fails_the_span_and_its_log_lines_name_request_and_trace(
    world: QueryWorld, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_arguments: object, **_more: object) -> None:
        raise StoreUnavailable("vector store", "as told")

    monkeypatch.setattr(world.vectors, "search", away)
    with capture_logs(processors=[merge_contextvars, add_trace_id]) as lines, recorded_spans() as spans:
        response = await client.post("/v1/search", data=picture(0), headers={REQUEST_ID_HEADER: "mine"})
        await refused(response, ErrorCode.STORE_UNAVAILABLE)
    request = spans.one("POST /v1/search")
    assert request.status.status_code is StatusCode.ERROR
    told = {line["event"]: (line.get("request_id"), line.get("trace_id")) for line in lines}
    assert told["store_unavailable"] == told["request"] == ("mine", trace_id(request))
