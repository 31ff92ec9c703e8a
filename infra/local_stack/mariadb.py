"""MariaDB: the system's program, on a data folder and a port of our own."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from infra.errors import ConfigurationError
from infra.local_stack import policies
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials, write_private
from infra.local_stack.program import Program
from infra.local_stack.supervisor import ProgramFailed, run_to_end
from infra.metadata_store.probe import probe
from infra.settings import StackSettings

DATABASE = "image_search"
USER = "image_search"
PORTS = frozenset({"mariadb_port"})
# The package `mariadb-server` would also start the system's own server. These hold the programs only.
PACKAGES = ("mariadb-server-core", "mariadb-client-core")
INSTALL_SECONDS = 600.0
FIRST_START_SECONDS = 120.0
PROBE_SECONDS = 4.0
# Debian keeps the server where only root's PATH looks.
MORE_FOLDERS = ("/usr/sbin", "/usr/local/sbin")


@dataclass(frozen=True, slots=True)
class Programs:
    """The server, and what makes its data folder."""

    server: Path
    maker: Path


def find() -> Programs | None:
    folders = os.pathsep.join((os.environ.get("PATH", os.defpath), *MORE_FOLDERS))
    server, maker = (shutil.which(name, path=folders) for name in ("mariadbd", "mariadb-install-db"))
    return Programs(Path(server), Path(maker)) if server and maker else None


async def programs(logs: Path, say: Callable[[str], None]) -> Programs:
    """Find MariaDB; where it is missing and root asks on Debian or Ubuntu, install the system's package.

    Raises ConfigurationError that says what to install.
    """
    found = find()
    if found is None and _may_install():
        say("installing MariaDB, the system's package")
        await _install(logs, say)
        found = find()
    if found is None:
        raise ConfigurationError(
            "the profile `full` needs MariaDB 10.6 or later: the programs mariadbd and mariadb-install-db. "
            f"On Debian and Ubuntu: apt install {' '.join(PACKAGES)}"
        )
    return found


def _may_install() -> bool:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return False
    families = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    return os.geteuid() == 0 and shutil.which("apt-get") is not None and not families.isdisjoint({"debian", "ubuntu"})


async def _install(logs: Path, say: Callable[[str], None]) -> None:
    # Another package manager may be at work: apt-get waits for it, but only if it is told to.
    apt = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=120")
    for arguments in (("update",), ("install", "--yes", "--no-install-recommends", *PACKAGES)):
        try:
            await run_to_end(
                "mariadb-install",
                (*apt, *arguments),
                logs=logs,
                environment={"DEBIAN_FRONTEND": "noninteractive"},
                seconds=INSTALL_SECONDS,
                say=lambda line: say(f"installing MariaDB: {line}"),
            )
        except ProgramFailed as error:
            raise ConfigurationError(
                f"MariaDB is missing and could not be installed; install it yourself: apt install {' '.join(PACKAGES)}\n{error}"
            ) from None


async def prepare(root: Path, settings: StackSettings, credentials: Credentials, found: Programs, logs: Path) -> None:
    """Make the data folder once, and what the server runs at each start. Raises ProgramFailed."""
    folder = root / "mariadb"
    folder.mkdir(parents=True, exist_ok=True)
    statements = accounts(credentials) + (services_accounts(credentials) if settings.stack_tls else "")
    write_private(folder / "init.sql", statements)
    if (folder / "data").exists():
        return
    # A whole folder or none: an interrupted one has some of the system's tables and never starts.
    scratch = folder / "data.new"
    await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
    await run_to_end(
        "mariadb-first-start",
        (
            str(found.maker),
            "--no-defaults",
            *_as_root(),
            f"--datadir={scratch}",
            # No account has an empty password: root is let in by the socket, if the system says that it is root.
            "--auth-root-authentication-method=socket",
            "--skip-test-db",
            "--skip-name-resolve",
        ),
        logs=logs,
        environment={},
        seconds=FIRST_START_SECONDS,
        say=lambda line: None,
    )
    scratch.rename(folder / "data")


def accounts(credentials: Credentials) -> str:
    """The text of init.sql, a statement a line. The user may make further databases whose names begin with ours."""
    pattern = DATABASE.replace("_", r"\_") + "%"
    return (
        f"CREATE DATABASE IF NOT EXISTS {DATABASE} CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;\n"
        f"CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{credentials.mariadb_password}';\n"
        f"GRANT ALL ON `{pattern}`.* TO '{USER}'@'127.0.0.1';\n"
    )


def services_accounts(credentials: Credentials) -> str:
    """As `accounts`: one for each service, by TLS only, with what its policy says and nothing else."""
    lines = []
    for service in policies.SERVICES:
        password = credentials.password_of(service)
        lines += [
            f"CREATE USER IF NOT EXISTS '{service}'@'%' IDENTIFIED BY '{password}' REQUIRE SSL;",
            f"REVOKE ALL PRIVILEGES, GRANT OPTION FROM '{service}'@'%';",
            *policies.database(service),
        ]
    return "".join(f"{line}\n" for line in lines)


def url(root: Path, settings: StackSettings, credentials: Credentials, *, service: str | None = None) -> str:
    """For a service, or for who may do everything with this database."""
    user, password = (service, credentials.password_of(service)) if service else (USER, credentials.mariadb_password)
    certificates = Certificates.of(root, settings)
    tls = f"?ssl_ca={quote(str(certificates.ca))}" if certificates else ""
    return f"mysql+aiomysql://{user}:{quote(password, safe='')}@127.0.0.1:{settings.mariadb_port}/{DATABASE}{tls}"


def _as_root() -> tuple[str, ...]:
    """It refuses to run as root unless it is told so by name.

    Its own user could not reach a folder below root's. Our account may neither read nor write files of the system.
    """
    return ("--user=root",) if os.geteuid() == 0 else ()


def _tls(certificates: Certificates) -> tuple[str, ...]:
    return (f"--ssl-cert={certificates.server}", f"--ssl-key={certificates.key}", "--require-secure-transport=ON")


def program(root: Path, settings: StackSettings, credentials: Credentials, found: Programs) -> Program:
    folder = root / "mariadb"
    certificates = Certificates.of(root, settings)
    return Program(
        name="mariadb",
        command=(
            str(found.server),
            "--no-defaults",
            *_as_root(),
            f"--datadir={folder / 'data'}",
            # Below the data folder. A whole path may be longer than the 107 bytes that a socket's name has.
            "--socket=server.sock",
            f"--pid-file={folder / 'server.pid'}",
            f"--port={settings.mariadb_port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--character-set-server=utf8mb4",
            "--collation-server=utf8mb4_bin",
            "--innodb-buffer-pool-size=128M",
            "--performance-schema=OFF",
            f"--tmpdir={folder}",
            f"--init-file={folder / 'init.sql'}",
            *(_tls(certificates) if certificates else ()),
        ),
        working_dir=folder,
        ready=lambda: probe(url(root, settings, credentials), timeout_seconds=PROBE_SECONDS),
        start_seconds=settings.server_start_seconds,
    )
