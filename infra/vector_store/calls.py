"""One call of the vector store's client: our own time-out, our own errors, and a client that comes back with its server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]  # it has no types
from pymilvus import AsyncMilvusClient  # type: ignore[import-untyped]  # it has no types
from pymilvus.exceptions import (  # type: ignore[import-untyped]  # it has no types
    DataNotMatchException,
    MilvusException,
    ParamError,
)

from infra.errors import ConfigurationError, ImageSearchError, PermanentError, StoreUnavailable
from infra.metrics import store_error

Result = TypeVar("Result")
Call = Callable[[AsyncMilvusClient, float], Awaitable[Result]]
"""Gets the client and the seconds that it may take."""

STORE = "vector store"

_COLLECTION_NOT_FOUND = 100
_INVALID_PARAMETER = 1100


@dataclass
class _Channel:
    client: Any
    calls: int = 0
    retired: bool = False


class Connection:
    """Makes the client when it is first needed, on the event loop that needs it, and again after it failed."""

    def __init__(self, uri: str, token: str, *, timeout_seconds: float) -> None:
        self._uri = uri
        self._token = token
        self._timeout = timeout_seconds
        self._channel: _Channel | None = None
        # The library logs a traceback for every error that it raises as well.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)

    async def call(self, call: Call[Result], *, timeout_seconds: float | None = None) -> Result:
        """Raises StoreUnavailable; PermanentError for what the server will never take."""
        seconds = timeout_seconds or self._timeout
        channel = self._channel or self._connected()
        channel.calls += 1
        try:
            async with asyncio.timeout(seconds):
                return await _uncancelled(call(channel.client, seconds))
        except TimeoutError:
            self._retire(channel)
            raise store_error(STORE, f"no answer in {seconds:g} s") from None
        except (MilvusException, grpc.RpcError, OSError, _ChannelClosed) as failure:
            error = _translated(failure)
            if isinstance(error, StoreUnavailable):
                self._retire(channel)
            raise error from failure
        finally:
            channel.calls -= 1
            await _close_unused(channel)

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.retired = True
            await _close_unused(channel)

    def _connected(self) -> _Channel:
        # dedicated: otherwise the library keeps one channel for all clients of a process, and never closes it.
        client = AsyncMilvusClient(self._uri, token=self._token, dedicated=True, timeout=self._timeout)
        self._channel = _Channel(client)
        return self._channel

    def _retire(self, channel: _Channel) -> None:
        """The next call connects anew: a channel to a server that went away can stay broken after it is back."""
        channel.retired = True
        if self._channel is channel:
            self._channel = None


async def _close_unused(channel: _Channel) -> None:
    """Closing cancels what is under way: a slow call must not take its neighbours with it."""
    if channel.retired and channel.calls == 0:
        with contextlib.suppress(MilvusException, grpc.RpcError, OSError):
            await channel.client.close()


class _ChannelClosed(Exception):
    """The channel was closed under a call that was under way."""


async def _uncancelled(call: Awaitable[Result]) -> Result:
    """The library closes a broken channel under its calls, which then must not look as if our own task was cancelled."""
    try:
        return await call
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _ChannelClosed from None


def _translated(error: Exception) -> ImageSearchError:
    if isinstance(error, (ParamError, DataNotMatchException)):
        return PermanentError("the vector store's client refuses what it was given")
    code = error.code if isinstance(error, MilvusException) else None
    if code == _COLLECTION_NOT_FOUND:
        return ConfigurationError("the vector collection is missing; run: image-search upgrade")
    if code == _INVALID_PARAMETER:
        return PermanentError("the vector store refuses what it was given")
    return store_error(STORE, f"{type(error).__name__}{f' {code}' if code is not None else ''}")
