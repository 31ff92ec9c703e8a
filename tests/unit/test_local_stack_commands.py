"""The `image-search` command itself: what it loads, what it says, how it ends."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from infra import cli
from infra.errors import ConfigurationError, StoreUnavailable
from infra.local_stack.folder import StackFolder, write_stack_file

HEAVY = ("torch", "openvino", "pymilvus", "faust", "aiohttp")


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.cli, ["--state-dir", str(tmp_path), *arguments])
    return result.exit_code, result.output


@pytest.fixture
def failing() -> click.Command:
    @click.command(name="failing")
    @click.argument("kind")
    def command(kind: str) -> None:
        raise ConfigurationError("set X") if kind == "configuration" else StoreUnavailable("broker", "no answer")

    return command


def test_our_errors_are_one_line_and_an_exit_status(
    tmp_path: Path, failing: click.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.cli.commands, "failing", failing)
    assert run(tmp_path, "failing", "configuration") == (2, "image-search: set X\n")
    assert run(tmp_path, "failing", "store") == (1, "image-search: broker is not available: no answer\n")


def test_a_service_that_cannot_be_loaded_is_named_and_the_rest_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = EntryPoint("left_out", "no_such_module.commands:commands", cli.COMMANDS)
    monkeypatch.setattr(cli, "entry_points", lambda group: [broken])
    cli.add_service_commands()
    assert "the commands of left_out could not be loaded: No module named 'no_such_module'" in capsys.readouterr().err


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from infra import cli; cli.add_service_commands();"
        f"print(sorted(cli.cli.commands), [name for name in {HEAVY!r} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("up", "down", "status", "put", "search", "events", "scan", "failures", "verify", "upgrade"):
        assert f"'{name}'" in output
    assert output.rstrip().endswith("[]"), output


def test_down_and_status_without_a_stack(tmp_path: Path) -> None:
    assert run(tmp_path, "down") == (0, "no stack runs here\n")
    code, output = run(tmp_path, "status")
    assert code == 1
    assert "no stack of profile embedded runs here" in output


def test_wipe_says_what_it_removes_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path, "embedded")
    folder.make()
    write_stack_file(folder, {"PROFILE": "embedded"})
    (folder.root / "metadata.db").write_bytes(b"x" * 2**21)
    (tmp_path / "mine.txt").write_text("not ours")
    code, output = run(tmp_path, "down", "--wipe")
    assert code == 0
    assert f"removed {folder.root}/metadata.db (2 MiB)" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_wiped_while_a_stack_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.local_stack import control

    folder = StackFolder(tmp_path, "embedded")
    with folder.locked(), pytest.raises(ConfigurationError, match="in use by pid"):
        control.wipe(folder)
    assert folder.root.exists()
