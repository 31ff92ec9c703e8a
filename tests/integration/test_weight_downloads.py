"""Weights by https from a server of our own on loopback, which breaks off, forgets what was asked, or serves something else."""

from __future__ import annotations

import hashlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.errors import ConfigurationError
from infra.settings import ModelSettings
from processors.embedding import download
from processors.embedding.catalog import ModelDescription
from processors.embedding.choice import chosen
from processors.embedding.weights import WeightFolders, obtain, partial_download
from tests.conftest import unavailable

CONTENT = bytes(range(256)) * 40_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


@dataclass
class Server:
    """`cuts`: after how many bytes of its body each of the next answers breaks off. `asked`: the Range of each request."""

    content: bytes = CONTENT
    ranges: bool = True
    says_length: bool = True
    status: int | None = None
    shifted: int = 0
    cuts: list[int] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


def handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            server.asked.append(asked)
            if server.status is not None:
                self.send_error(server.status)
                return
            begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
            if begin >= len(server.content):
                self.send_error(416)
                return
            body = server.content[begin:]
            self.send_response(206 if asked and server.ranges else 200)
            if server.says_length:
                self.send_header("Content-Length", str(len(body)))
            if asked and server.ranges:
                begin += server.shifted
                self.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
            self.end_headers()
            self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
            return

    return Handler


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if shutil.which("openssl") is None:
        unavailable("the program openssl is missing: it makes the certificate of these tests")
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-subj", "/CN=weights", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    state = Server()
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    http_server.socket = context.wrap_socket(http_server.socket, server_side=True)
    state.url = f"https://127.0.0.1:{http_server.server_port}/far/model.pth"
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    http_server.shutdown()
    http_server.server_close()
    thread.join()


@pytest.fixture
def row(server: Server) -> ModelDescription:
    return chosen(ModelSettings(model="own", own_weights=server.url, weights_sha256=DIGEST))


@pytest.fixture
def folders(tmp_path: Path) -> WeightFolders:
    return WeightFolders(own=None, downloads=tmp_path / "cache" / "weights")


def left_over(row: ModelDescription, folders: WeightFolders, content: bytes) -> Path:
    folders.downloads.mkdir(parents=True)
    partial = partial_download(row, folders)
    partial.write_bytes(content)
    return partial


def test_a_whole_file_with_its_progress(server: Server, row: ModelDescription, folders: WeightFolders) -> None:
    said: list[str] = []
    path = obtain(row, folders, said.append)
    assert path.read_bytes() == CONTENT and path.name == f"{DIGEST[:8]}-model.pth"
    assert said[0] == f"downloading {path.name}" and said[-1] == "  10 of 10 MB" and 10 <= len(said) <= 12
    assert obtain(row, folders, print) == path and server.asked == [None]


def test_without_a_length_it_still_comes_whole(server: Server, row: ModelDescription, folders: WeightFolders) -> None:
    server.says_length = False
    assert obtain(row, folders, print).read_bytes() == CONTENT


def test_a_connection_that_breaks_is_gone_on_with_at_once(
    server: Server, row: ModelDescription, folders: WeightFolders
) -> None:
    server.cuts = [HALF, 1000]
    said: list[str] = []
    assert obtain(row, folders, said.append).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert sum("going on from there" in line for line in said) == 2


def test_what_came_before_a_failure_is_kept_for_the_next_start(
    server: Server, row: ModelDescription, folders: WeightFolders
) -> None:
    server.cuts = [HALF, 0]
    with pytest.raises(ConfigurationError, match="5 MB came and are kept") as caught:
        obtain(row, folders, print)
    for part in (f"{DIGEST[:8]}-model.pth", DIGEST, server.url, str(folders.downloads)):
        assert part in str(caught.value)
    assert partial_download(row, folders).read_bytes() == CONTENT[:HALF]
    said: list[str] = []
    assert obtain(row, folders, said.append).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={HALF}-" and "  going on at 5 of 10 MB" in said
    assert not partial_download(row, folders).exists()


def test_a_server_that_knows_no_parts_sends_all_of_it(server: Server, row: ModelDescription, folders: WeightFolders) -> None:
    left_over(row, folders, CONTENT[:HALF])
    server.ranges = False
    assert obtain(row, folders, print).read_bytes() == CONTENT


def test_a_server_that_sends_another_part_is_asked_for_all(
    server: Server, row: ModelDescription, folders: WeightFolders
) -> None:
    left_over(row, folders, CONTENT[:HALF])
    server.shifted = 1
    with pytest.raises(ConfigurationError, match="another part"):
        obtain(row, folders, print)
    assert obtain(row, folders, print).read_bytes() == CONTENT and server.asked[-1] is None


@pytest.mark.parametrize(
    "begin",
    [b"?" * HALF, CONTENT[: HALF - 1] + b"?", CONTENT + b"?", b"?" * len(CONTENT)],
    ids=["of another file", "damaged", "too long", "as long"],
)
def test_a_begin_that_does_not_fit_is_given_up(
    server: Server, row: ModelDescription, folders: WeightFolders, begin: bytes
) -> None:
    left_over(row, folders, begin)
    assert obtain(row, folders, print).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(begin)}-", None]


def test_all_of_it_came_before_but_for_its_name(server: Server, row: ModelDescription, folders: WeightFolders) -> None:
    left_over(row, folders, CONTENT)
    assert obtain(row, folders, print).read_bytes() == CONTENT


@pytest.mark.parametrize("begin", [b"", CONTENT[:HALF]], ids=["from its begin", "gone on with"])
def test_another_file_is_not_kept(server: Server, row: ModelDescription, folders: WeightFolders, begin: bytes) -> None:
    if begin:
        left_over(row, folders, begin)
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(ConfigurationError, match="is not the expected file"):
        obtain(row, folders, print)
    assert [path.suffix for path in folders.downloads.iterdir()] == [".lock"]


@pytest.mark.parametrize("begin", [b"", CONTENT[:HALF]], ids=["from its begin", "gone on with"])
def test_a_server_that_has_no_such_file(server: Server, row: ModelDescription, folders: WeightFolders, begin: bytes) -> None:
    if begin:
        left_over(row, folders, begin)
    server.status = 404
    with pytest.raises(ConfigurationError, match=r"cannot be downloaded \(Not Found\)"):
        obtain(row, folders, print)


def test_a_file_without_end(
    server: Server, row: ModelDescription, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LARGEST_DOWNLOAD_BYTES", len(CONTENT) - 1)
    server.says_length = False
    with pytest.raises(ConfigurationError, match="too large"):
        obtain(row, folders, print)
    assert not partial_download(row, folders).exists()


def test_a_certificate_that_nobody_knows(
    server: Server, row: ModelDescription, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ConfigurationError, match="cannot be downloaded"):
        obtain(row, folders, print)
    assert server.asked == []


def test_of_two_that_want_it_one_downloads(server: Server, row: ModelDescription, folders: WeightFolders) -> None:
    def once(_: int) -> Path:
        return obtain(row, folders, silent)

    silent: Callable[[str], None] = lambda _: None  # noqa: E731
    with ThreadPoolExecutor(4) as several:
        assert {path.read_bytes() for path in several.map(once, range(4))} == {CONTENT}
    assert server.asked == [None]
