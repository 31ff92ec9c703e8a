"""A TCP proxy on loopback that can misbehave as networks do: cut connections, keep answers, be slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

CHUNK_BYTES = 64 * 1024


class Proxy:
    """Forwards to one address. `lose_answers`: what the server says is thrown away and the connection is cut, so that the
    client cannot know whether its request was done. `delay_seconds`: every answer waits for so long. `stall`: nothing passes
    any more, in connections old and new; what was sent meanwhile comes late, as it does when a network is whole again.
    `swallow`: of an answer nothing comes through, or the head of HTTP and no body; its connection stays open, and silent for
    good."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.lose_answers = False
        self.delay_seconds = 0.0
        self.lost = 0
        self.stalled = 0
        self._passing = asyncio.Event()
        self._passing.set()
        self.swallow: Literal["answers", "bodies", None] = None
        self.swallowed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @classmethod
    @asynccontextmanager
    async def to(cls, host: str, port: int) -> AsyncIterator[Proxy]:
        proxy = cls(host, port)
        proxy._server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        try:
            yield proxy
        finally:
            proxy._server.close()
            for task in proxy._tasks:
                task.cancel()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stall(self) -> None:
        self._passing.clear()

    def go_on(self) -> None:
        self._passing.set()

    async def _serve(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            client_writer.close()
            self._tasks.discard(task)
            return
        try:
            ways = [
                asyncio.ensure_future(self._forward(client_reader, writer, answers=False)),
                asyncio.ensure_future(self._forward(reader, client_writer, answers=True)),
            ]
            _, left = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in left:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for one in (writer, client_writer):
                with suppress(OSError, RuntimeError):
                    one.transport.abort()
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        silent = False
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if answers and self.lose_answers:
                    self.lost += 1
                    return
                if answers and self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                if not self._passing.is_set():
                    self.stalled += 1
                    await self._passing.wait()
                if answers and (silent or self.swallow):
                    passed = _head_of(data) if self.swallow == "bodies" and not silent else b""
                    silent = silent or len(passed) < len(data)
                    self.swallowed += silent
                    data = passed
                writer.write(data)
                await writer.drain()


def _head_of(data: bytes) -> bytes:
    """The head of an HTTP answer that begins here; nothing of one that goes on here."""
    head, end, _ = data.partition(b"\r\n\r\n")
    return head + end if head.startswith(b"HTTP/") else b""
