"""The page: one HTML file with its script and style, all from here, no build step."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from query_service.endpoint import Endpoint

_FOLDER = Path(__file__).parent.parent / "ui"

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cache-Control": "no-cache",
}


async def page(_request: web.Request) -> web.FileResponse:
    return _file("index.html")


async def script(_request: web.Request) -> web.FileResponse:
    return _file("app.js")


async def style(_request: web.Request) -> web.FileResponse:
    return _file("style.css")


async def icon(_request: web.Request) -> web.FileResponse:
    return _file("icon.svg")


def _file(name: str) -> web.FileResponse:
    return web.FileResponse(_FOLDER / name, headers=_HEADERS)


ENDPOINTS = (
    Endpoint("GET", "/", page, "The page", "text/html"),
    Endpoint("GET", "/ui/app.js", script, "The page's script", "text/javascript"),
    Endpoint("GET", "/ui/style.css", style, "The page's style", "text/css"),
    Endpoint("GET", "/ui/icon.svg", icon, "The page's icon", "image/svg+xml"),
)
