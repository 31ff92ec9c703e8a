"""Who asks, and may they? Decided by what each endpoint declares, and written down where something is changed."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

import structlog
from aiohttp import hdrs, web
from yarl import URL

from infra.metadata_store.interface import ApiKey
from query_service.endpoint import Endpoint, Handler
from query_service.errors import RequestRefused
from query_service.key_ring import unauthorized
from query_service.keys import KEY_RING, SCOPES, SETTINGS
from query_service.request import API_KEY
from schemas.access import Open, Scope
from schemas.api import ErrorCode

KEY_HEADER = "X-API-Key"

_CHANGING = frozenset({Scope.WRITE, Scope.ADMIN})
_BEARER = "bearer "

_CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": (
        f"Authorization, {KEY_HEADER}, Content-Type, If-Match, If-None-Match, Last-Event-ID, X-Request-Id"
    ),
    "Access-Control-Max-Age": "600",
}
_CORS_EXPOSED = "ETag, Location, Retry-After, X-Request-Id"

log = structlog.get_logger("query_service.audit")

Scopes = Mapping[tuple[str, str], Scope | Open]


def scopes_of(endpoints: Iterable[Endpoint]) -> Scopes:
    return {(endpoint.method, endpoint.path): endpoint.scope for endpoint in endpoints}


@web.middleware
async def audit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A line for each request to a route that changes something, also for one that was refused. Outside the error shape."""
    if _scope(request) not in _CHANGING:
        return await handler(request)
    status: int | None = None
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        key: ApiKey | None = request.get(API_KEY)
        log.info(
            "audit",
            key=None if key is None else key.key_id,
            key_name=None if key is None else key.name,
            remote=request.remote,
            method=request.method,
            path=request.path,
            status=status,
        )


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Innermost. Raises RequestRefused: UNAUTHORIZED, FORBIDDEN, TOO_MANY_REQUESTS."""
    if request.method == hdrs.METH_OPTIONS and _allowed_origin(request) is not None:
        return web.Response(status=204, headers=_CORS_HEADERS)
    scope = _scope(request)
    if scope is None or isinstance(scope, Open):
        return await handler(request)
    if request.app[SETTINGS].api_keys == "required":
        await _admit(request, scope)
    else:
        _refuse_other_sites(request)
    return await handler(request)


async def _admit(request: web.Request, scope: Scope) -> None:
    ring = request.app[KEY_RING]
    key = await ring.key(_shown(request))
    request[API_KEY] = key
    ring.admit(key.key_id)
    if not key.grant.allows(scope):
        raise RequestRefused(
            ErrorCode.FORBIDDEN,
            f"This API key lacks the scope `{scope}`.",
            details={"needed": scope, "has": sorted(key.grant.scopes)},
        )


def _shown(request: web.Request) -> str:
    """The one key of the request's headers. Never of its address, which ends up in logs and histories."""
    credentials = request.headers.getall(hdrs.AUTHORIZATION, [])
    bearer = {text[len(_BEARER) :].strip() for text in credentials if text.lower().startswith(_BEARER)}
    shown = {*bearer, *request.headers.getall(KEY_HEADER, [])}
    if len(shown) != 1:
        raise unauthorized(
            f"Show one API key: `Authorization: Bearer <key>` or `{KEY_HEADER}: <key>`. `image-search keys create` makes one."
        )
    return shown.pop()


def _refuse_other_sites(request: web.Request) -> None:
    """Without keys, the browser of whoever sits here would do for any page on the web what it does for ours.

    A page of another site names itself in Origin; one that made its own name point at this machine names that in Host.
    """
    host = request.url.host or ""
    if request.app[SETTINGS].api_keys == "off" and not _is_this_machine(host):
        raise RequestRefused(
            ErrorCode.FORBIDDEN,
            "API keys are off, so this answers on this machine's own names only: localhost, 127.0.0.1 or [::1].",
        )
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and origin not in request.app[SETTINGS].cors_origins and _host_of(origin) != request.host:
        raise RequestRefused(ErrorCode.FORBIDDEN, "Pages of other sites may not ask here while API keys are off.")


def _host_of(origin: str) -> str | None:
    try:
        url = URL(origin)
        return url.host if url.is_default_port() else f"{url.host_subcomponent}:{url.port}"
    except ValueError:
        return None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _scope(request: web.Request) -> Scope | Open | None:
    """None where there is no such route. A route that nothing was declared for is an error of ours, and stays shut."""
    resource = request.match_info.route.resource
    if resource is None:
        return None
    return request.app[SCOPES][request.method, resource.canonical]


def _allowed_origin(request: web.Request) -> str | None:
    origin = request.headers.get(hdrs.ORIGIN)
    return origin if origin in request.app[SETTINGS].cors_origins else None


async def allow_origins(request: web.Request, response: web.StreamResponse) -> None:
    """For the signal on_response_prepare: pages of the sites that the settings name may read the answer."""
    if not request.app[SETTINGS].cors_origins:
        return
    response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    origin = _allowed_origin(request)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _CORS_EXPOSED
