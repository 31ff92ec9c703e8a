"""What a stack keeps under its state folder: data and logs by profile, passwords, a lock, and the file that clients source."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.errors import ConfigurationError
from infra.settings import STACK_FILE_NAME

# What a POSIX shell, python-dotenv and SQLAlchemy's URLs each read differently inside quotes or not at all.
UNSAFE_IN_PATHS = frozenset("'\"\\$%?#`\n\r")


@dataclass(frozen=True, slots=True)
class StackFolder:
    """`<state_dir>/<profile>/` and what lies in it."""

    state_dir: Path
    profile: str

    def __post_init__(self) -> None:
        bad = UNSAFE_IN_PATHS.intersection(str(self.state_dir.absolute()))
        if bad:
            raise ConfigurationError(
                f"the state folder's path may not hold {' '.join(sorted(bad))}: {self.state_dir.absolute()}"
            )

    @property
    def root(self) -> Path:
        return self.state_dir.absolute() / self.profile

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def stack_file(self) -> Path:
        return self.state_dir.absolute() / STACK_FILE_NAME

    @property
    def processes_file(self) -> Path:
        return self.root / "processes.json"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    def make(self) -> None:
        # 0700: the servers below keep pictures and some of their passwords in files of their own making.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the profile's data. Raises ConfigurationError that names the holder. The kernel lets go when we die."""
        self.make()
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"the data in {self.root} is in use by {self.holder() or 'another process'}; "
                    "end that stack first (image-search down), or choose another --state-dir"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {' '.join(sys.argv)}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder_pid(self) -> int | None:
        """The process that runs this stack now; None when none does."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).split(b" ")[0]
            return int(pid) if pid.isdigit() else None
        finally:
            os.close(descriptor)
        return None

    def holder(self) -> str | None:
        pid = self.holder_pid()
        return None if pid is None else f"pid {pid}: {self.lock_file.read_text().partition(' ')[2].strip()}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Random at the first start of a profile and kept with its data, because the servers keep them too."""

    s3_access_key: str
    s3_secret_key: str
    filer_write_key: str
    filer_read_key: str
    milvus_password: str
    kafka_cluster_id: str
    mariadb_password: str
    kafka_password: str
    minio_password: str
    """Of MinIO at Kafka."""
    bridge_password: str
    worker_password: str
    query_password: str
    upgrade_password: str
    """Of a service at every store; these are for a stack with TLS only, as is Kafka's."""

    @classmethod
    def of(cls, folder: StackFolder) -> Credentials:
        """Read them; make and store those that are missing, which are all at first and few after an upgrade."""
        path = folder.root / "credentials.json"
        stored: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        found = cls(**{**asdict(cls._random()), **stored})
        if asdict(found) != stored:
            write_private(path, json.dumps(asdict(found), indent=1))
        return found

    def password_of(self, service: str) -> str:
        return {
            "bridge": self.bridge_password,
            "worker": self.worker_password,
            "query": self.query_password,
            "upgrade": self.upgrade_password,
        }[service]

    @classmethod
    def _random(cls) -> Credentials:
        return cls(
            s3_access_key=secrets.token_hex(10).upper(),
            s3_secret_key=secrets.token_hex(20),
            filer_write_key=secrets.token_hex(32),
            filer_read_key=secrets.token_hex(32),
            milvus_password=secrets.token_hex(16),
            # Kafka wants 16 bytes as 22 characters of URL-safe base64.
            kafka_cluster_id=secrets.token_urlsafe(16),
            mariadb_password=secrets.token_hex(16),
            kafka_password=secrets.token_hex(16),
            minio_password=secrets.token_hex(16),
            bridge_password=secrets.token_hex(16),
            worker_password=secrets.token_hex(16),
            query_password=secrets.token_hex(16),
            upgrade_password=secrets.token_hex(16),
        )


def write_private(path: Path, text: str) -> None:
    """Replace a file as a whole, readable by its owner only from the first byte on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def running_profile(state_dir: Path) -> str | None:
    """The profile that stack.env names: the one that runs, or ran last."""
    return read_stack_file(StackFolder(state_dir, "")).get("PROFILE")


def read_stack_file(folder: StackFolder) -> dict[str, str]:
    """What `write_stack_file` wrote; empty when nothing did."""
    if not folder.stack_file.exists():
        return {}
    lines = (line.partition("=") for line in folder.stack_file.read_text().splitlines() if not line.startswith("#"))
    return {name: value.removeprefix("'").removesuffix("'") for name, equals, value in lines if equals}


def write_stack_file(folder: StackFolder, values: Mapping[str, str]) -> None:
    """Write `.image-search/stack.env`, which a shell and infra.settings.load both read."""
    lines = ["# Written by `image-search up`. To use it in a shell: set -a; . this-file; set +a"]
    for name, value in values.items():
        # Between single quotes a shell takes all else as it stands, and python-dotenv all but this.
        if any(part in value for part in ("'", "\\", "${", "\n", "\r")):
            raise ConfigurationError(
                f"{name} may not hold a quote, a backslash, ${{ or a line break ({folder.stack_file} cannot)"
            )
        lines.append(f"{name}='{value}'")
    write_private(folder.stack_file, "\n".join(lines) + "\n")
