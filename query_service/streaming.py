"""Sending a body piece by piece to a reader who may be slow, gone, or never there."""

from __future__ import annotations

import asyncio

from aiohttp import web

STALLED_SECONDS = 60.0
"""A reader who takes nothing for this long loses its place: a stuck one must not hold it for ever."""


class ReaderGone(Exception):
    """Nobody takes the rest of this body."""


def is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def break_off(request: web.Request) -> None:
    """End the connection in a way that no client takes for the end of the body."""
    if request.transport is not None:
        request.transport.abort()


async def send(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Returns when the reader has room for more, so that what is not taken piles up nowhere. Raises ReaderGone."""
    try:
        async with asyncio.timeout(STALLED_SECONDS):
            await response.write(data)
    except ConnectionError:
        raise ReaderGone from None
    except TimeoutError:
        break_off(request)
        raise ReaderGone from None
