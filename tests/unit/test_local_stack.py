"""What the local stack writes, pins and refuses, without starting anything."""

from __future__ import annotations

import hashlib
import re
import shlex
import stat
import threading
from importlib import resources
from pathlib import Path
from typing import Self

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from infra.errors import ConfigurationError
from infra.local_stack import demo, kafka_jars, milvus, sample_pictures, servers
from infra.local_stack.folder import Credentials, StackFolder, read_stack_file, write_stack_file
from infra.local_stack.kafka_jars import DownloadFailed
from infra.local_stack.stack import computed_variables, kept_variables, shell_values
from infra.settings import BridgeSettings, CommonSettings, StackSettings, load

ISSUE_NAMES = {
    *("S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_BUCKET", "KAFKA_BOOTSTRAP"),
    *("MILVUS_URI", "MILVUS_TOKEN", "DATABASE_URL", "QUERY_URL", "PROFILE"),
}


@pytest.fixture
def folder(tmp_path: Path) -> StackFolder:
    made = StackFolder(tmp_path / "state", "embedded")
    made.make()
    return made


# -- folder ------------------------------------------------------------------------------------------------------------
def test_a_second_stack_on_the_same_data_is_told_who_has_it(folder: StackFolder) -> None:
    with folder.locked():
        assert folder.holder_pid() is not None
        with pytest.raises(ConfigurationError, match=rf"in use by pid {folder.holder_pid()}: .*pytest"), folder.locked():
            pass
    assert folder.holder_pid() is None
    with folder.locked():
        pass


def test_passwords_are_random_kept_and_private(folder: StackFolder, tmp_path: Path) -> None:
    first = Credentials.of(folder)
    assert Credentials.of(folder) == first
    assert stat.S_IMODE((folder.root / "credentials.json").stat().st_mode) == 0o600
    other = StackFolder(tmp_path / "other", "embedded")
    other.make()
    assert Credentials.of(other).s3_secret_key != first.s3_secret_key


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z_]{1,20}", fullmatch=True),
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])),
    )
)
def test_shells_and_settings_read_the_same_values(tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]) -> None:
    folder = StackFolder(tmp_path_factory.mktemp("state"), "embedded")
    if any(part in value for value in values.values() for part in ("'", "\\", "${")):
        with pytest.raises(ConfigurationError):
            write_stack_file(folder, values)
        return
    write_stack_file(folder, values)
    lines = [line for line in folder.stack_file.read_text().splitlines() if not line.startswith("#")]
    by_shell = dict(shlex.split(line)[0].split("=", 1) for line in lines)
    assert read_stack_file(folder) == by_shell == dotenv_values(folder.stack_file) == values


def test_the_stack_file_is_private_and_has_every_name(folder: StackFolder) -> None:
    settings, credentials = StackSettings(), Credentials.of(folder)
    write_stack_file(
        folder, {**shell_values(folder, settings, credentials), **computed_variables(folder, settings, credentials)}
    )
    assert stat.S_IMODE(folder.stack_file.stat().st_mode) == 0o600
    assert set(read_stack_file(folder)) >= ISSUE_NAMES


def test_services_read_what_the_stack_wrote(folder: StackFolder) -> None:
    settings, credentials = StackSettings.model_validate({"s3_port": 9123, "kafka_port": 9124}), Credentials.of(folder)
    write_stack_file(folder, computed_variables(folder, settings, credentials))
    read = load(BridgeSettings, state_dir=folder.state_dir)
    assert read.s3_endpoint == "http://127.0.0.1:9123"
    assert read.s3_secret_key.get_secret_value() == credentials.s3_secret_key
    assert read.kafka_bootstrap == ("127.0.0.1:9124",)
    assert read.seaweedfs_config_dir == folder.root / "seaweedfs" / "config"
    assert load(StackSettings, state_dir=folder.state_dir).ports() == settings.ports()


def test_a_setting_given_once_is_kept_for_the_next_start(folder: StackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_SEARCH_MODEL", "resnet50")
    monkeypatch.setenv("IMAGE_SEARCH_STATE_DIR", "/elsewhere")
    write_stack_file(folder, {"PROFILE": "embedded", **kept_variables(folder)})
    monkeypatch.delenv("IMAGE_SEARCH_MODEL")
    assert kept_variables(folder)["IMAGE_SEARCH_MODEL"] == "resnet50"
    assert "IMAGE_SEARCH_STATE_DIR" not in kept_variables(folder)


def test_a_folder_that_shells_would_misread_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\$"):
        StackFolder(Path("/tmp/a$b"), "embedded")


# -- ports -------------------------------------------------------------------------------------------------------------
def test_the_promised_ports_are_the_defaults() -> None:
    settings = StackSettings()
    assert (settings.query_port, settings.bridge_port) == (8080, 8081)
    assert (settings.s3_port, settings.kafka_port, settings.milvus_port) == (9000, 9092, 19530)
    assert max(settings.ports().values()) < 32768, "an outgoing connection could take it first"


def test_no_two_ports_may_be_the_same() -> None:
    with pytest.raises(ValidationError, match="s3_port and kafka_port are both 9092"):
        StackSettings.model_validate({"s3_port": 9092})


def test_every_port_of_a_server_reaches_its_configuration(folder: StackFolder) -> None:
    """A port that is a setting and is not passed on would let two stacks collide."""
    numbers = iter(range(20_000, 21_000))
    settings = StackSettings.model_validate({name: next(numbers) for name in StackSettings().ports()})
    credentials = Credentials.of(folder)
    from infra.local_stack import kafka, seaweedfs

    seaweedfs.prepare(folder.root, credentials)
    milvus.prepare(folder.root, settings)
    programs = [
        seaweedfs.program(folder.root, settings, credentials),
        milvus.program(folder.root, settings, credentials, Path("/nowhere")),
    ]
    written = " ".join(
        [*(text for program in programs for text in (*program.command, *program.environment.values()))]
        + [path.read_text() for path in (folder.root / "milvus" / "configs").iterdir()]
        + [kafka.properties(folder.root, settings, credentials)]
    )
    assert [name for name, port in servers.server_ports("embedded", settings).items() if str(port) not in written] == []


# -- Milvus ------------------------------------------------------------------------------------------------------------
def test_the_template_is_filled() -> None:
    text = milvus.render(
        "a: {{ port(int): 1 }}\nb: {{ dir }}\nc: {{ level: info }}\nd: {{ on(bool): false }}", {"dir": "/x", "port": 7}
    )
    assert text == "a: 7\nb: /x\nc: info\nd: false"


def test_another_version_of_the_template_is_noticed() -> None:
    with pytest.raises(ConfigurationError, match="needs a value for fresh_thing"):
        milvus.render("a: {{ fresh_thing }}", {})
    with pytest.raises(ConfigurationError, match="does not know gone_thing"):
        milvus.render("a: 1", {"gone_thing": 1})


def test_nothing_of_the_template_is_left_unfilled(folder: StackFolder) -> None:
    milvus.prepare(folder.root, StackSettings())
    written = (folder.root / "milvus" / "configs" / "milvus.yaml").read_text()
    assert "{{" not in written
    assert "authorizationEnabled: true" in written


def test_milvus_is_unpacked_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lzma

    packed = tmp_path / "wheel" / "data" / "bin"
    packed.mkdir(parents=True)
    (packed / "milvus.lzma").write_bytes(lzma.compress(b"program"))
    monkeypatch.setattr(resources, "files", lambda package: tmp_path / "wheel")
    said: list[str] = []
    folder = milvus.unpack(tmp_path / "cache", said.append, threading.Event())
    assert (folder / "milvus").read_bytes() == b"program"
    assert (folder / "milvus").stat().st_mode & 0o111
    assert said == ["unpacking Milvus: 1 of 1 files"]
    assert milvus.unpack(tmp_path / "cache", said.append, threading.Event()) == folder
    assert len(said) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


# -- Kafka -------------------------------------------------------------------------------------------------------------
def test_every_jar_is_pinned_and_no_host_is_named() -> None:
    jars = kafka_jars.pinned()
    by_artifact = {jar.artifact: jar for jar in jars}
    assert len(by_artifact) == len(jars) == 46
    assert all(re.fullmatch("[0-9a-f]{64}", jar.sha256) for jar in jars)
    assert by_artifact["kafka_2.13"].version == by_artifact["kafka-clients"].version == "4.1.1"
    assert "log4j-slf4j-impl" in by_artifact, "without it a failing broker prints nothing"
    assert "://" not in kafka_jars.PIN_FILE.read_text()


class Impatient(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        return False


class _Maven:
    """Stands for the repository: gives the same bytes for every file."""

    content = b"a jar"

    def __init__(self, repo_cache: Path, **_options: object) -> None:
        self.path = repo_cache / "got.jar"

    def project(self, _group: str, _artifact: str) -> Self:
        return self

    def at_version(self, _version: str) -> Self:
        return self

    def artifact(self) -> Self:
        return self

    def resolve(self) -> Path:
        self.path.write_bytes(self.content)
        return self.path


def _only(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    jar = kafka_jars.Jar("org.example", "thing", "1.0", digest)
    monkeypatch.setattr(kafka_jars, "pinned", lambda: [jar])
    monkeypatch.setattr(kafka_jars, "MavenContext", _Maven)


def test_a_jar_is_kept_when_it_is_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, hashlib.sha256(_Maven.content).hexdigest())
    said: list[str] = []
    (path,) = kafka_jars.fetch(tmp_path, said.append, threading.Event())
    assert path.read_bytes() == _Maven.content
    assert said == ["downloading Kafka: 1 of 1 files"]
    assert kafka_jars.fetch(tmp_path, said.append, threading.Event()) == [path]
    assert len(said) == 1


def test_another_jar_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, "0" * 64)
    with pytest.raises(DownloadFailed, match=r"org\.example:thing:1\.0 .* pinned is 0000"):
        kafka_jars.fetch(tmp_path, lambda text: None, Impatient())
    assert list((tmp_path / "kafka").iterdir()) == []


def test_a_download_can_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, "0" * 64)
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(DownloadFailed, match="stopped"):
        kafka_jars.fetch(tmp_path, lambda text: None, given_up)


# -- samples -----------------------------------------------------------------------------------------------------------
def test_each_sample_is_small_whole_and_has_source_and_licence() -> None:
    sources = (sample_pictures.FOLDER / "SOURCES.md").read_text()
    named = dict(re.findall(r"^\| (\S+\.(?:jpg|png|webp)) \|.*\| ([^|]+) \|$", sources, re.MULTILINE))
    paths = sample_pictures.paths()
    assert {path.name for path in paths} == set(named)
    assert 16 <= len(paths) <= 24
    assert {path.suffix for path in paths} == {".jpg", ".png", ".webp"}
    assert all(licence.startswith(("CC0", "CC BY", "public domain")) for licence in named.values())
    for path in paths:
        assert path.stat().st_size < 60_000, path.name
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) >= 128


def test_the_demo_searches_with_another_picture_than_it_put() -> None:
    original = (sample_pictures.FOLDER / demo.ORIGINAL).read_bytes()
    copy = demo.edited(original)
    assert copy != original
    assert len(copy) < len(original) / 2


def test_settings_of_tests_and_stack_are_the_same_shape(folder: StackFolder) -> None:
    values = servers.addresses(folder, StackSettings(), Credentials.of(folder))
    assert set(values) - set(BridgeSettings.model_fields) == {"processor_data_dir"}
    assert CommonSettings.model_validate(values).database_url.get_secret_value().endswith("/embedded/metadata.db")
