"""The conversation with the converting process, played by small programs."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from infra.errors import ConfigurationError
from infra.settings import ProcessorSettings
from processors.embedding import model_cache
from processors.embedding.catalog import CATALOG
from processors.embedding.model_cache import ensure_converted

ROW = CATALOG["efficientnet_lite0"]
PYTHON = sys.executable


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of the converting process; a test writes what it does."""
    program = tmp_path / "converter"
    monkeypatch.setattr(sys, "executable", str(program))
    return program


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!{PYTHON}\n{body}\n")
    path.chmod(0o700)


async def test_why_the_converting_process_failed_is_passed_on(tmp_path: Path, converter: Path) -> None:
    write_program(
        converter,
        'import sys; sys.stdin.read(); print(\'{"say": "working"}\'); print(\'{"error": "put the file there"}\'); sys.exit(1)',
    )
    said: list[str] = []
    with pytest.raises(ConfigurationError, match=r"^put the file there$"):
        await ensure_converted(ROW, ProcessorSettings(cache_dir=tmp_path), said.append)
    assert said[1:] == ["working"]


async def test_a_converting_process_that_crashes(tmp_path: Path, converter: Path) -> None:
    write_program(converter, "import os, sys; sys.stdin.read(); sys.stderr.write('x' * 100_000); os._exit(7)")
    with pytest.raises(ConfigurationError, match="exit code 7"):
        await ensure_converted(ROW, ProcessorSettings(cache_dir=tmp_path), print)


async def test_a_converting_process_that_takes_too_long_is_ended(
    tmp_path: Path, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(converter, "import signal; signal.pause()")
    monkeypatch.setattr(model_cache, "CONVERSION_SECONDS", 0.2)
    with pytest.raises(ConfigurationError, match="took longer"):
        await ensure_converted(ROW, ProcessorSettings(cache_dir=tmp_path), print)


async def test_giving_up_ends_the_converting_process(tmp_path: Path, converter: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"import os, pathlib, signal; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); signal.pause()"
    write_program(converter, body)
    waiting = asyncio.create_task(ensure_converted(ROW, ProcessorSettings(cache_dir=tmp_path), print))
    async with asyncio.timeout(30):
        while not read(pid_file):
            await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(ProcessLookupError):
        os.kill(int(read(pid_file)), 0)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
