"""What holds for every request: its id, its line in the log, its metrics, the error shape, and safe headers."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from aiohttp import hdrs, web

from infra.metrics import HTTP_REQUESTS, HTTP_SECONDS
from infra.tracing import NO_SPAN, Span, SpanKind, begin, failed, within
from query_service.endpoint import Handler, answer
from query_service.errors import RequestRefused, refusal_of
from query_service.request import API_KEY
from query_service.streaming import break_off, is_gone
from schemas.api import ErrorCode

REQUEST_ID_HEADER = "X-Request-Id"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

EVENTS_PATH = "/v1/events"
"""Streams last as long as their reader likes: their time says nothing."""

CLIENT_LEFT = 499
"""In log and metrics only: the client hung up before it had an answer."""

# By monitoring and by every open page, every few seconds: at info they would drown the rest.
_ASKED_ALL_THE_TIME = frozenset({"/metrics", "/healthz/live", "/healthz/ready", "/v1/status"})

REQUEST_ID = web.RequestKey("request_id", str)

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    # For data. The page and pictures bring their own.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

log = structlog.get_logger("query_service.access")


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: gives the request its id and, when it has ended, writes it down."""
    sent = request.headers.get(REQUEST_ID_HEADER, "")
    # What a client sends ends up in our log and headers: only what can do no harm there is taken over.
    request_id = sent if _SANE_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
    request[REQUEST_ID] = request_id
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unknown"
    method = request.method if request.method in hdrs.METH_ALL else "other"
    span = NO_SPAN if route in _ASKED_ALL_THE_TIME else begin(f"{method} {route}", SpanKind.SERVER, headers=request.headers)
    since = time.perf_counter()
    status = CLIENT_LEFT
    with structlog.contextvars.bound_contextvars(request_id=request_id), within(span):
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            seconds = time.perf_counter() - since
            HTTP_REQUESTS.labels(route, method, status).inc()
            if route != EVENTS_PATH:
                HTTP_SECONDS.labels(route).observe(seconds)
            _note(span, request_id=request_id, route=route, method=method, status=status)
            write = log.debug if route in _ASKED_ALL_THE_TIME else log.info
            key = request.get(API_KEY)
            who = {} if key is None else {"key": key.key_id}
            spent = round(1000 * seconds, 2)
            write("request", **who, method=request.method, path=request.path, status=status, milliseconds=spent)


def _note(span: Span, *, request_id: str, route: str, method: str, status: int) -> None:
    if not span.is_recording():
        return
    span.set_attributes(
        {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "image_search.request_id": request_id,
        }
    )
    if status >= 500:
        failed(span, str(status))


@web.middleware
async def translate_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever is raised becomes the one error shape, unless the answer has already begun."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_answer(request, _of_aiohttp(error))
    except Exception as error:
        if is_gone(request):
            # Nobody reads this answer. Raising would write a traceback for each client that hangs up.
            return web.Response(status=CLIENT_LEFT)
        refusal = refusal_of(error)
        if request.writer.output_size > 0:
            # Too late for a status. Breaking the connection is how the client learns that the body is not whole.
            break_off(request)
            return web.Response(status=refusal.code.status)
        return error_answer(request, refusal)


def error_answer(request: web.Request, refusal: RequestRefused) -> web.Response:
    response = answer(refusal.answer(request[REQUEST_ID]), refusal.code.status)
    if refusal.code is ErrorCode.BODY_TIMEOUT:
        response.force_close()
    response.headers.update(refusal.headers)
    return response


def _of_aiohttp(error: web.HTTPException) -> RequestRefused:
    match error:
        case web.HTTPNotFound():
            return RequestRefused(
                ErrorCode.ROUTE_NOT_FOUND, "There is nothing at this path. /openapi.json lists what there is."
            )
        case web.HTTPMethodNotAllowed():
            allowed = sorted(error.allowed_methods)
            return RequestRefused(
                ErrorCode.METHOD_NOT_ALLOWED,
                f"This path takes {', '.join(allowed)}.",
                details={"allowed": allowed},
                headers={"Allow": ", ".join(allowed)},
            )
        case web.HTTPRequestEntityTooLarge():
            return RequestRefused(ErrorCode.BODY_TOO_LARGE, "The body is larger than this route takes.")
        case _:
            return refusal_of(error)


async def add_safe_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For the signal on_response_prepare, so that streamed answers have them too."""
    response.headers[REQUEST_ID_HEADER] = request.get(REQUEST_ID, "")
    # aiohttp has put its version and Python's here, which is for nobody to know.
    response.headers["Server"] = "image-search"
    for name, value in _SAFE_HEADERS.items():
        response.headers.setdefault(name, value)
