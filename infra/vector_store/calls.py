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
from infra.metrics import STORE_ERRORS, store_error
from infra.vector_store.address import Address

Result = TypeVar("Result")
Call = Callable[[AsyncMilvusClient, float], Awaitable[Result]]
"""Gets the client and the seconds that it may take."""

STORE = "vector store"

_NOT_CONNECTED = 2
_COLLECTION_NOT_FOUND = 100
_INVALID_PARAMETER = 1100


class NoWayIn(StoreUnavailable):
    """Nothing answers, or what answers does not take us. The library has one error for all of it."""

    def __init__(self, address: Address) -> None:
        doubts = ["nothing answers there", f"it speaks {'no TLS' if address.encrypted else 'TLS (then write https)'}"]
        if address.encrypted:
            doubts.append("its certificate is of another CA (IMAGE_SEARCH_MILVUS_CA_FILE) or for another host")
        doubts.append("it does not take this user or password (IMAGE_SEARCH_MILVUS_TOKEN)")
        STORE_ERRORS.labels(STORE).inc()
        super().__init__(STORE, f"no way in at {address.uri}: {', or '.join(doubts)}")


@dataclass
class _Channel:
    client: Any
    calls: int = 0
    retired: bool = False


class Connection:
    """Makes the client when it is first needed, on the event loop that needs it, and again after it failed."""

    def __init__(self, address: Address, token: str, *, timeout_seconds: float) -> None:
        self._address = address
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
            error = _translated(failure, self._address)
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
        self._channel = _Channel(self._address.client(self._token, timeout_seconds=self._timeout))
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


def _translated(error: Exception, address: Address) -> ImageSearchError:
    if isinstance(error, (ParamError, DataNotMatchException)):
        return PermanentError("the vector store's client refuses what it was given")
    if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return store_error(STORE, "it denies this to our user: give it the rights of infra/deploy/policies/milvus")
    code = error.code if isinstance(error, MilvusException) else None
    if code == _NOT_CONNECTED:
        return NoWayIn(address)
    if code == _COLLECTION_NOT_FOUND:
        return ConfigurationError("the vector collection is missing; run: image-search upgrade")
    if code == _INVALID_PARAMETER:
        return PermanentError("the vector store refuses what it was given")
    return store_error(STORE, f"{type(error).__name__}{f' {code}' if code is not None else ''}")
