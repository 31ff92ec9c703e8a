"""Weights: where they are looked for, that a wrong file is never read, and what a failed download says."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Self

import pytest

from infra.errors import ConfigurationError
from processors.embedding import weights as module
from processors.embedding.catalog import CATALOG, LocalFile, WebFile, WheelFile
from processors.embedding.weights import WeightFolders, obtain

CONTENT = b"weights" * 1000
ROW = replace(
    CATALOG["resnet50"],
    weights=replace(CATALOG["resnet50"].weights, file_name="w.pth", sha256=hashlib.sha256(CONTENT).hexdigest()),
)


@pytest.fixture
def folders(tmp_path: Path) -> WeightFolders:
    return WeightFolders(own=tmp_path / "own", downloads=tmp_path / "cache" / "weights")


def put(folder: Path | None, content: bytes = CONTENT) -> Path:
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "w.pth").write_bytes(content)
    return folder / "w.pth"


class Answer(io.BytesIO):
    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = Message()
        self.headers["Content-Length"] = str(len(content))
        self.status = 200
        self.url = "https://weights.example/w.pth"

    def __enter__(self) -> Self:
        return self


class Server:
    """In place of urlopen: answers, or raises what it was given."""

    def __init__(self, answer: bytes | OSError) -> None:
        self.answer = answer
        self.answer_type = Answer
        self.asked: list[str] = []

    def __call__(self, request: urllib.request.Request, timeout: float) -> Answer:
        assert timeout > 0
        self.asked.append(request.full_url)
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer_type(self.answer)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    class Installed(Server):
        def __init__(self, answer: bytes | OSError) -> None:
            super().__init__(answer)
            monkeypatch.setattr(urllib.request, "urlopen", self)

    monkeypatch.setattr(module, "_torchvision_url", lambda source: f"https://weights.example/{source.weights}")
    return Installed


def test_the_operators_folder_comes_first(folders: WeightFolders) -> None:
    put(folders.downloads)
    own = put(folders.own)
    assert obtain(ROW, folders, print) == own


def test_a_downloaded_file_is_used_again(folders: WeightFolders) -> None:
    path = put(folders.downloads)
    assert obtain(ROW, folders, print) == path


def test_weights_in_a_wheel_need_no_network() -> None:
    path = obtain(CATALOG["efficientnet_lite0"], WeightFolders(None, Path("nowhere")), print)
    assert path.name == "efficientnet-lite0-57934424.pth"


def test_a_file_with_another_digest_is_refused(folders: WeightFolders) -> None:
    path = put(folders.own, CONTENT + b"!")
    with pytest.raises(ConfigurationError, match="Remove it or replace it") as caught:
        obtain(ROW, folders, print)
    assert str(path) in str(caught.value)


def test_a_download_is_checked_kept_and_told_about(folders: WeightFolders, serve: type[Server]) -> None:
    server = serve(CONTENT)
    said: list[str] = []
    path = obtain(ROW, folders, said.append)
    assert path.read_bytes() == CONTENT and path.parent == folders.downloads
    assert server.asked == ["https://weights.example/ResNet50_Weights.IMAGENET1K_V2"] and said[0] == "downloading w.pth"
    assert obtain(ROW, folders, print) == path and len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "(Name or service not known)"),
        (TimeoutError("timed out"), "(timed out)"),
        (CONTENT[:-1], "not the expected file"),
    ],
)
def test_a_failed_download_says_which_file_to_put_where(
    folders: WeightFolders, serve: type[Server], answer: bytes | OSError, says: str
) -> None:
    serve(answer)
    with pytest.raises(ConfigurationError) as caught:
        obtain(ROW, folders, print)
    for part in (says, "w.pth", ROW.weights.sha256, str(folders.own)):
        assert part in str(caught.value)
    assert [path.suffix for path in folders.downloads.iterdir()] == [".lock"]


def test_a_checkpoint_of_ones_own_is_used_where_it_lies(folders: WeightFolders, tmp_path: Path) -> None:
    put(folders.own, b"another file of that name")
    row = replace(ROW, weights=replace(ROW.weights, source=LocalFile(str(tmp_path / "own.pth"))))
    with pytest.raises(ConfigurationError, match=r"OWN_WEIGHTS: there is no file .*own\.pth"):
        obtain(row, folders, print)
    (tmp_path / "own.pth").write_bytes(CONTENT)
    assert obtain(row, folders, print) == tmp_path / "own.pth"
    (tmp_path / "own.pth").write_bytes(CONTENT + b"!")
    with pytest.raises(ConfigurationError, match="its sha256 is"):
        obtain(row, folders, print)


def test_a_file_of_the_web_says_its_address_for_the_way_by_hand(folders: WeightFolders, serve: type[Server]) -> None:
    serve(urllib.error.URLError(OSError(101, "Network is unreachable")))
    row = replace(ROW, weights=replace(ROW.weights, source=WebFile("https://weights.example/far/w.pth")))
    with pytest.raises(ConfigurationError, match=r"Get w\.pth .* from https://weights\.example/far/w\.pth by hand"):
        obtain(row, folders, print)


def test_weights_of_a_wheel_that_is_not_installed(folders: WeightFolders) -> None:
    row = replace(ROW, weights=replace(ROW.weights, source=WheelFile("no_such_package_here", "w.pth")))
    with pytest.raises(ConfigurationError, match="no_such_package_here"):
        obtain(row, folders, print)


def test_a_server_that_sends_us_on_to_plain_http(folders: WeightFolders, serve: type[Server]) -> None:
    class Downgraded(Answer):
        def __init__(self, content: bytes) -> None:
            super().__init__(content)
            self.url = "http://weights.example/w.pth"

    server = serve(CONTENT)
    server.answer_type = Downgraded
    with pytest.raises(ConfigurationError, match="without https"):
        obtain(ROW, folders, print)


def test_only_https(folders: WeightFolders, serve: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(CONTENT)
    monkeypatch.setattr(module, "_torchvision_url", lambda source: "file:///etc/passwd")
    with pytest.raises(ConfigurationError, match="https only"):
        obtain(ROW, folders, print)
    assert server.asked == []
