"""Kafka's jars: named and pinned in kafka-jars.txt, fetched once by jgo, kept in the cache folder."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jgo.maven import MavenContext

from infra.errors import ImageSearchError

PIN_FILE = Path(__file__).with_name("kafka-jars.txt")
DOWNLOADS_AT_ONCE = 4
ATTEMPTS = 4
TIMEOUT_SECONDS = 30


class DownloadFailed(ImageSearchError):
    """A file could not be fetched, or is not the one that is pinned."""


@dataclass(frozen=True, slots=True)
class Jar:
    """Coordinates as Maven writes them, and the SHA-256 of the file."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    @classmethod
    def parse(cls, line: str) -> Jar:
        coordinates, digest = line.split()
        group, artifact, version = coordinates.split(":")
        return cls(group, artifact, version, digest)


def pinned() -> list[Jar]:
    lines = PIN_FILE.read_text().splitlines()
    return [Jar.parse(line) for line in lines if line and not line.startswith("#")]


def fetch(cache_dir: Path, say: Callable[[str], None], given_up: threading.Event) -> list[Path]:
    """Paths of all jars, in the cache folder. What is missing is downloaded, checked against its digest and only then kept.

    Blocking; ends after the files under way when `given_up` is set. Raises DownloadFailed.
    """
    folder = cache_dir / "kafka"
    folder.mkdir(parents=True, exist_ok=True)
    jars = pinned()
    missing = [jar for jar in jars if not (folder / jar.filename).exists()]
    if missing:
        # jgo tells about each file at level info; ours says how many are left.
        logging.getLogger("jgo").setLevel(logging.WARNING)
        done = 0
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            for _ in pool.map(lambda jar: _download(jar, folder, given_up), missing):
                done += 1
                say(f"downloading Kafka: {done} of {len(missing)} files")
    return [folder / jar.filename for jar in jars]


def _download(jar: Jar, folder: Path, given_up: threading.Event) -> None:
    problem = ""
    # jgo keeps what it got even if the connection broke half-way, so each attempt has a folder of its own.
    for attempt in range(1, ATTEMPTS + 1):
        if given_up.is_set():
            raise DownloadFailed("the download was stopped")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            maven = MavenContext(repo_cache=Path(scratch), local_repos=[], timeout=TIMEOUT_SECONDS)
            try:
                got = maven.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
            except (RuntimeError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                found = hashlib.sha256(got.read_bytes()).hexdigest()
                if found == jar.sha256:
                    got.replace(folder / jar.filename)
                    return
                problem = f"its SHA-256 is {found}, pinned is {jar.sha256}"
        if attempt < ATTEMPTS:
            given_up.wait(2.0**attempt)
    raise DownloadFailed(
        f"{jar.group}:{jar.artifact}:{jar.version} could not be downloaded: {problem}. "
        f"A machine without a network can be given the files of another one's cache folder: {folder}"
    )
