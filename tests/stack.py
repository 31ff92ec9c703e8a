"""A whole stack as its operator starts it: `image-search up` in a process of its own, on free ports, in a folder of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from infra.local_stack import ports
from infra.settings import ENV_PREFIX, STACK_FILE_NAME, AnySettings, StackSettings, load

IMAGE_SEARCH = str(Path(sys.executable).with_name("image-search"))
START_SECONDS = 300.0
STOP_SECONDS = 60.0


class FullStack:
    """A running stack. Everything is asked from outside, as an operator would."""

    def __init__(self, process: subprocess.Popen[bytes], state_dir: Path, environment: dict[str, str], log: Path) -> None:
        self.process, self.state_dir, self.environment, self.log = process, state_dir, environment, log

    @classmethod
    @contextmanager
    def running(cls, folder: Path, *, arguments: Sequence[str] = (), **variables: str) -> Iterator[FullStack]:
        """Start, wait until it is ready, and end it with SIGINT, as Ctrl-C does."""
        stack = cls.start(folder, arguments=arguments, **variables)
        try:
            stack.wait_until_ready()
            yield stack
        finally:
            stack.stop()

    @classmethod
    def start(cls, folder: Path, *, arguments: Sequence[str] = (), **variables: str) -> FullStack:
        names = [f"{ENV_PREFIX}{name.upper()}" for name in StackSettings().ports()]
        free = dict(zip(names, map(str, ports.find_free(len(names))), strict=True))
        environment = {**os.environ, **free, **variables}
        state_dir, log = folder / "state", folder / "up.log"
        command = [IMAGE_SEARCH, "--state-dir", str(state_dir), "up", *arguments]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, cwd=folder, start_new_session=True
            )
        return cls(process, state_dir, environment, log)

    @property
    def query_url(self) -> str:
        return f"http://127.0.0.1:{self.environment[f'{ENV_PREFIX}QUERY_PORT']}"

    def settings(self, kind: type[AnySettings]) -> AnySettings:
        return load(kind, state_dir=self.state_dir)

    def variables(self) -> dict[str, str]:
        """What stack.env gives to a shell."""
        text = subprocess.run(
            ["/bin/sh", "-c", f'set -a; . "{self.state_dir / STACK_FILE_NAME}"; env -0'],
            capture_output=True,
            check=True,
            env={},
        ).stdout.decode()
        return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the stack did not start:\n" + "\n".join(self.log.read_text().splitlines()[-40:]))
            time.sleep(0.25)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.query_url}/healthz/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run an `image-search` command against this stack."""
        return subprocess.run(
            [IMAGE_SEARCH, "--state-dir", str(self.state_dir), *arguments],
            env=self.environment,
            check=check,
            text=True,
            capture_output=True,
            timeout=START_SECONDS,
        )

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_SECONDS)

    # -- what its processes use ----------------------------------------------------------------------------------------
    def programs(self) -> dict[str, list[psutil.Process]]:
        """Each program of the stack with all processes below it."""
        supervisor = psutil.Process(self.process.pid)
        found = {"supervisor": [supervisor]}
        for program in supervisor.children():
            with suppress(psutil.NoSuchProcess):  # ended meanwhile, or ended and not yet noticed by the supervisor
                found.setdefault(_name_of(program), []).extend([program, *program.children(recursive=True)])
        return found

    def cpu_seconds(self) -> dict[str, float]:
        used: dict[str, float] = {}
        for name, processes in self.programs().items():
            for process in processes:
                times = process.cpu_times()
                used[name] = used.get(name, 0.0) + times.user + times.system
        return used

    def resident_bytes(self) -> dict[str, int]:
        """Proportional set size: what is shared between processes is counted once."""
        return {
            name: sum(process.memory_full_info().pss for process in processes) for name, processes in self.programs().items()
        }

    def processes_with(self, library: str) -> list[str]:
        """Programs that have mapped a library whose file name contains this text."""
        return [
            name
            for name, processes in self.programs().items()
            if any(library in Path(mapped.path).name for process in processes for mapped in process.memory_maps())
        ]


def _name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    for service in ("bridge", "worker", "serve"):
        if service in words:
            return service
    text = " ".join(words)
    return next((name for name in ("weed", "minio", "mariadbd", "kafka", "milvus") if name in text), words[0] if words else "?")
