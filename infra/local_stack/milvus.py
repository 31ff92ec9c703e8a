"""Milvus standalone 2.3.5, run from one unpacked copy in the cache folder.

The wheel's own starter is not used: it unpacks 250 MB for each data folder, leaves its child behind on SIGTERM, and moves
to another port without a word when one is taken.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata, resources
from pathlib import Path

from infra.errors import ConfigurationError, ImageSearchError, StoreUnavailable
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials
from infra.local_stack.program import NotReady, Program
from infra.local_stack.supervisor import ProgramFailed
from infra.settings import StackSettings
from infra.vector_store.accounts import change_password
from infra.vector_store.address import Address
from infra.vector_store.calls import NoWayIn
from infra.vector_store.probe import probe

USER = "root"
FIRST_PASSWORD = "Milvus"  # noqa: S105 - what every new Milvus has; changed before anything else starts
ADDRESS_NOTICE = (
    "Milvus listens on every network interface (version 2.3.5 cannot do otherwise). Clients need a password; the ports "
    "between its own parts have none: use a firewall, or a network that you trust."
)
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*(?:\(\w+\))?\s*(?::\s*([^}]*?))?\s*\}\}")
PROBE_TIMEOUT_SECONDS = 4.0
_ROLES = ("PROXY", "ROOTCOORD", "QUERYCOORD", "QUERYNODE", "INDEXNODE", "DATACOORD", "DATANODE")


def unpack(cache_dir: Path, say: Callable[[str], None], given_up: threading.Event) -> Path:
    """The folder with Milvus's program and libraries, unpacked from the wheel once for each version.

    Blocking; raises ProgramFailed soon after `given_up` is set.
    """
    folder = cache_dir / f"milvus-{metadata.version('milvus')}"
    if folder.exists():
        return folder
    packed = resources.files("milvus") / "data" / "bin"
    names = sorted(entry.name for entry in packed.iterdir() if entry.name.endswith(".lzma"))
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for number, name in enumerate(names, 1):
        if given_up.is_set():
            shutil.rmtree(scratch)
            raise ProgramFailed("unpacking Milvus was stopped")
        say(f"unpacking Milvus: {number} of {len(names)} files")
        target = scratch / name.removesuffix(".lzma")
        with (packed / name).open("rb") as raw, lzma.open(raw) as plain, target.open("wb") as file:
            shutil.copyfileobj(plain, file, 1024 * 1024)
        target.chmod(0o755)
    try:
        # A whole folder or none: a second stack may unpack at the same time, and either result will do.
        scratch.rename(folder)
    except OSError:
        shutil.rmtree(scratch)
        if not folder.exists():
            raise
    return folder


def prepare(root: Path, settings: StackSettings) -> None:
    folder = root / "milvus"
    for name in ("configs", "data", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    template = (resources.files("milvus") / "data" / "config.yaml.template").read_text()
    (folder / "configs" / "milvus.yaml").write_text(render(template, _template_values(root, settings)))
    (folder / "configs" / "glog.conf").write_text("--logtostderr=true\n--minloglevel=1\n")
    client = f"http://127.0.0.1:{settings.milvus_etcd_port}"
    peer = f"http://127.0.0.1:{settings.milvus_etcd_peer_port}"
    # JSON is YAML. Without this file etcd takes its usual ports, whatever Milvus is told.
    etcd = {
        "name": "default",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
        "log-level": "warn",
    }
    (folder / "configs" / "etcd.yaml").write_text(json.dumps(etcd, indent=1))


def render(template: str, values: Mapping[str, object]) -> str:
    """Fill the wheel's template: `{{ name }}`, `{{ name: default }}`, `{{ name(type): default }}`.

    Raises ConfigurationError for a placeholder with neither value nor default, and for a value without a placeholder:
    then the wheel is another version than the one these settings were found for.
    """
    unused = set(values)

    def fill(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        unused.discard(name)
        if name not in values and default is None:
            raise ConfigurationError(f"Milvus's configuration needs a value for {name}; is the wheel `milvus` another version?")
        return str(values.get(name, default))

    text = _PLACEHOLDER.sub(fill, template)
    if unused:
        raise ConfigurationError(f"Milvus's configuration does not know {', '.join(sorted(unused))}; another version?")
    return text


def address(root: Path, settings: StackSettings) -> Address:
    certificates = Certificates.of(root, settings)
    scheme = "https" if certificates else "http"
    return Address(f"{scheme}://127.0.0.1:{settings.milvus_port}", certificates.ca if certificates else None)


def program(root: Path, settings: StackSettings, credentials: Credentials, binaries: Path) -> Program:
    folder = root / "milvus"
    return Program(
        name="milvus",
        # The alias names its pid file, which lies in one place for all of a machine: two stacks would share it.
        command=(str(binaries / "milvus"), "run", "standalone", f"-alias=stack-{settings.milvus_port}"),
        working_dir=folder,
        environment=_environment(folder, settings),
        library_path=binaries,
        ready=lambda: _ready(address(root, settings), credentials.milvus_password),
        start_seconds=settings.server_start_seconds,
        stop_seconds=20.0,
    )


def _template_values(root: Path, settings: StackSettings) -> dict[str, object]:
    data = root / "milvus" / "data"
    certificates = Certificates.of(root, settings)
    return {
        "etcd_port": settings.milvus_etcd_port,
        "proxy_port": settings.milvus_port,
        "proxy_internal_port": settings.milvus_proxy_port,
        "root_coord_port": settings.milvus_root_coord_port,
        "query_coord_port": settings.milvus_query_coord_port,
        "query_node_port": settings.milvus_query_node_port,
        "index_node_port": settings.milvus_index_node_port,
        "data_coord_port": settings.milvus_data_coord_port,
        "data_node_port": settings.milvus_data_node_port,
        "etcd_data_dir": data / "etcd",
        "etcd_log_path": root / "logs" / "milvus-etcd.log",
        "local_storage_dir": data,
        "rocksmq_data_dir": data / "rocksmq",
        "system_log_path": root / "logs",
        "authorization_enabled": "true",
        **(_tls_values(certificates) if certificates else {}),
    }


def _tls_values(certificates: Certificates) -> dict[str, object]:
    # Mode 1: the server shows a certificate and asks clients for none. Its HTTP API is gone then.
    return {
        "tls_mode": 1,
        "server_pem_path": certificates.server,
        "server_key_path": certificates.key,
        "ca_pem_path": certificates.ca,
    }


def _environment(folder: Path, settings: StackSettings) -> dict[str, str]:
    """Settings that the template does not offer; Milvus reads each of its settings from the environment, too."""
    return {
        "DEPLOY_MODE": "STANDALONE",
        "MILVUSCONF": str(folder / "configs"),
        "MILVUS_RUN_DIR": str(folder / "run"),
        "METRICS_PORT": str(settings.milvus_metrics_port),
        "ETCD_CONFIG_PATH": str(folder / "configs" / "etcd.yaml"),
        "ETCD_ENDPOINTS": f"127.0.0.1:{settings.milvus_etcd_port}",
        # Its parts find each other by this address; by default it is that of the network, which a laptop changes.
        **{f"{role}_IP": "127.0.0.1" for role in _ROLES},
        # With collections loaded it would not end within ten minutes of SIGTERM.
        "COMMON_GRACEFULSTOPTIMEOUT": "3",
        "COMMON_SESSION_TTL": "5",
        # A vector is found about 65 ms after it was written, not 150 to 350.
        "PROXY_TIMETICKINTERVAL": "50",
        # The interim index of growing segments finds a third of what it should.
        "QUERYNODE_SEGCORE_INTERIMINDEX_ENABLEINDEX": "false",
        # After a start the log is read again from the last written segment, ticks included, at 400 entries a second: with the
        # usual 600 s that takes 40 s.
        "DATANODE_SEGMENT_SYNCPERIOD": "30",
        "LOG_LEVEL": "warn",
        "LOG_STDOUT": "false",
        "LOG_FILE_MAXSIZE": "20",
        "LOG_FILE_MAXBACKUPS": "2",
    }


async def _ready(address: Address, password: str) -> None:
    """It lets us in, and each loaded collection answers a real query. Its health page says yes too early.

    At the first start the password is still the one that every Milvus has, and is changed here.
    """
    try:
        await probe(address, f"{USER}:{password}", timeout_seconds=PROBE_TIMEOUT_SECONDS)
    except NoWayIn as error:
        with suppress(StoreUnavailable):
            await change_password(address, USER, FIRST_PASSWORD, password, timeout_seconds=PROBE_TIMEOUT_SECONDS)
        raise NotReady(str(error)) from None
    except ImageSearchError as error:
        raise NotReady(str(error)) from None
