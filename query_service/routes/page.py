"""The page: one HTML file with its script and style, all from here, no build step."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from query_service.endpoint import Endpoint
from schemas.access import Open

_FOLDER = Path(__file__).parent.parent / "ui"

_HTML, _SCRIPT, _STYLE, _ICON = "text/html", "text/javascript", "text/css", "image/svg+xml"

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
        # A picture that was fetched with a key has no address of its own.
        "img-src 'self' blob:"
    ),
    "Cache-Control": "no-cache",
}


async def page(_request: web.Request) -> web.FileResponse:
    return _file("index.html", _HTML)


async def script(_request: web.Request) -> web.FileResponse:
    return _file("app.js", _SCRIPT)


async def style(_request: web.Request) -> web.FileResponse:
    return _file("style.css", _STYLE)


async def icon(_request: web.Request) -> web.FileResponse:
    return _file("icon.svg", _ICON)


def _file(name: str, media_type: str) -> web.FileResponse:
    # Named here: what the host's table of types says differs from machine to machine.
    return web.FileResponse(_FOLDER / name, headers={**_HEADERS, "Content-Type": f"{media_type}; charset=utf-8"})


ENDPOINTS = (
    Endpoint("GET", "/", page, "The page", _HTML, scope=Open.PAGE),
    Endpoint("GET", "/ui/app.js", script, "The page's script", _SCRIPT, scope=Open.PAGE),
    Endpoint("GET", "/ui/style.css", style, "The page's style", _STYLE, scope=Open.PAGE),
    Endpoint("GET", "/ui/icon.svg", icon, "The page's icon", _ICON, scope=Open.PAGE),
)
