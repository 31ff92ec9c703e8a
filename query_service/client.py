"""The command line's side of the HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Self

import aiohttp
from pydantic import ValidationError

from infra.errors import PermanentError, TransientError
from query_service.sse import Message, Parser
from schemas.api import ErrorAnswer, SearchAnswer

REQUEST_SECONDS = 60.0
SILENCE_SECONDS = 45.0
"""An event stream says something at least every 15 seconds: one that is silent for this long is dead."""

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0
LONGEST_LINE_BYTES = 4 * 1024 * 1024


class ServiceRefused(PermanentError):
    """The service answered with an error; the message has its words and its code."""


class ServiceUnreachable(TransientError):
    """Nobody answers, or says to come back later."""


class QueryClient:
    """Use as a context manager. Every method raises ServiceRefused and ServiceUnreachable."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers, read_bufsize=LONGEST_LINE_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def search(self, picture: bytes, parameters: Mapping[str, str]) -> SearchAnswer:
        try:
            async with self._session.post(
                f"{self._url}/v1/search",
                params=parameters,
                data=picture,
                headers={"Content-Type": "application/octet-stream"},
                timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
            ) as response:
                await _raise_for_error(response)
                return SearchAnswer.model_validate_json(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from None

    async def replay(self, parameters: Mapping[str, str]) -> AsyncIterator[Message]:
        """What is there now, then the end."""
        async for message in self._messages({**parameters, "follow": "false"}, Parser()):
            yield message

    async def follow(self, parameters: Mapping[str, str]) -> AsyncIterator[Message]:
        """For ever: comes back with its last id whenever the connection ends. Raises ServiceRefused only."""
        parser = Parser()
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                async for message in self._messages(parameters, parser):
                    wait = FIRST_WAIT_SECONDS
                    yield message
            except ServiceUnreachable:
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            else:
                # The service ended the stream itself: it is stopping.
                await asyncio.sleep(wait)
            parser = Parser(parser.last_id)

    async def _messages(self, parameters: Mapping[str, str], parser: Parser) -> AsyncIterator[Message]:
        headers = {"Last-Event-ID": parser.last_id} if parser.last_id else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECONDS)
        try:
            async with self._session.get(
                f"{self._url}/v1/events", params=parameters, headers=headers, timeout=timeout
            ) as response:
                await _raise_for_error(response)
                async for line in response.content:
                    message = parser.feed(line.decode().rstrip("\r\n"))
                    if message is not None:
                        yield message
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        return ServiceUnreachable(
            f"{self._url} does not answer ({type(error).__name__}). Is it running? See `image-search status`"
        )


async def _raise_for_error(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    try:
        error = ErrorAnswer.model_validate_json(await response.read()).error
    except ValidationError:
        raise ServiceRefused(f"the service answered {response.status}, not in its own form: is this its address?") from None
    kind = ServiceUnreachable if response.status in (429, 503) else ServiceRefused
    raise kind(f"{error.message} ({error.code})")
