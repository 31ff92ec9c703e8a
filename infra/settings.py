"""Every setting of every service: one validated class a service, prefix IMAGE_SEARCH_, units in names.

A value comes from the environment, else from the stack file that `image-search up` wrote, else from its default here.
A secret may be given by file: IMAGE_SEARCH_X_FILE names a file that holds the value of IMAGE_SEARCH_X.
docs/configuration.md and .env.example are generated from these classes, and a test holds them to it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from infra.errors import ConfigurationError

ENV_PREFIX = "IMAGE_SEARCH_"
DEFAULT_STATE_DIR = Path(".image-search")
STACK_FILE_NAME = "stack.env"

LAST_PORT = 65535
Port = Annotated[int, Field(ge=1, le=LAST_PORT)]
Names = Annotated[tuple[str, ...], NoDecode]
"""A tuple that is written as one comma-separated value."""
Numbers = Annotated[tuple[float, ...], NoDecode]
"""The same of numbers."""
OptionalFile = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
"""Empty is none: that is how an environment takes back what a file of settings gave."""


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image-search"


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True, validate_default=True)


class CommonSettings(_Settings):
    """What every service needs to know of the deployment."""

    deployment: str = Field(
        "local", pattern=r"^[a-z0-9-]{1,32}$", description="Name of this deployment; part of every event's source."
    )
    buckets: Names = Field(("images",), description="Buckets that are followed, comma-separated.")
    follow: Literal["seaweedfs", "notifications", "none"] = Field(
        "seaweedfs", description="How changes are heard of: SeaweedFS's change log, or a store's notifications on their topic."
    )
    notification_arns: Names = Field(
        (), description="Targets that the buckets' notification rules shall name, comma-separated; none: rules are left alone."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line written.")
    log_format: Literal["json", "console"] = Field("json", description="JSON for machines, console for people.")
    traces_endpoint: str = Field(
        "",
        pattern=r"^(https?://[^/]+)?$",
        description="Where traces are sent to, by OTLP over gRPC, such as http://127.0.0.1:4317; none: nothing is traced.",
    )
    traces_sample_share: float = Field(1.0, ge=0, le=1, description="Share of the traces that begin here and are recorded.")
    cache_dir: Path = Field(default_factory=_cache_dir, description="Downloads and converted models, kept between deployments.")

    s3_endpoint: str = Field("http://127.0.0.1:9000", pattern=r"^https?://[^/]+$", description="Object store, scheme and host.")
    s3_access_key: str = Field("", description="Access key of the object store.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="Secret key of the object store.")
    s3_region: str = Field("us-east-1", description="Region that requests are signed for.")
    s3_ca_file: OptionalFile = Field(
        None, description="CA that the store's certificate must be of, as PEM; unset: what the system trusts. For https only."
    )
    s3_timeout_seconds: float = Field(30.0, gt=0, description="Longest wait for one object store call.")
    s3_connections: int = Field(32, ge=1, le=1024, description="Open connections to the object store at once, for a process.")

    kafka_bootstrap: Names = Field(("127.0.0.1:9092",), description="Brokers, host:port, comma-separated.")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        description="What the brokers speak, in Kafka's words. SSL is TLS; SASL is by user and password. "
        "With SASL_PLAINTEXT anybody in between reads what is sent.",
    )
    kafka_ca_file: OptionalFile = Field(
        None, description="CA that the brokers' certificates must be of, as PEM; unset: what the system trusts."
    )
    kafka_certificate_file: OptionalFile = Field(None, description="Our own certificate, as PEM, for brokers that ask for one.")
    kafka_key_file: OptionalFile = Field(None, description="Key of our own certificate, as PEM.")
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How user and password are shown to the brokers."
    )
    kafka_username: str = Field("", description="User at the brokers.")
    kafka_password: SecretStr = Field(SecretStr(""), description="Password of that user.")
    kafka_topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="Put before each topic and consumer group."
    )
    kafka_partitions: int = Field(
        8, ge=1, le=1024, description="Partitions of a topic when it is created. Do not change later."
    )
    kafka_replication: int = Field(1, ge=1, le=9, description="Copies of each partition when a topic is created.")
    kafka_timeout_seconds: float = Field(15.0, gt=0, description="Longest wait for one broker call.")
    commit_interval_seconds: float = Field(
        1.0, gt=0, description="Time between commits of offsets; bounds work repeated after a kill."
    )

    milvus_uri: str = Field("http://127.0.0.1:19530", pattern=r"^https?://[^/]+$", description="Vector store, scheme and host.")
    milvus_token: SecretStr = Field(SecretStr(""), description="user:password of the vector store.")
    milvus_ca_file: OptionalFile = Field(
        None, description="CA that the store's certificate must be of, as PEM; unset: one that gRPC knows. For https only."
    )
    milvus_server_name: str = Field(
        "", description="Name in the store's certificate, where it is not the host of milvus_uri. For https only."
    )
    milvus_timeout_seconds: float = Field(10.0, gt=0, description="Longest wait for one vector store call.")
    milvus_collection_prefix: str = Field("", pattern=r"^[a-z0-9_]{0,32}$", description="Put before each collection's name.")

    database_url: SecretStr = Field(
        SecretStr("sqlite+aiosqlite:///.image-search/embedded/metadata.db"),
        description="SQLAlchemy URL: sqlite+aiosqlite:///PATH or mysql+aiomysql://user:password@host:port/name; "
        "with ?ssl_ca=FILE (and &ssl_cert=FILE&ssl_key=FILE) only over TLS, to a server with a certificate of that CA.",
    )
    database_pool_size: int = Field(5, ge=1, le=100, description="Database connections of a process.")
    database_timeout_seconds: float = Field(10.0, gt=0, description="Longest wait for one transaction.")

    @model_validator(mode="before")
    @classmethod
    def _comma_separated(cls, values: dict[str, object]) -> dict[str, object]:
        names = ("buckets", "kafka_bootstrap", "notification_arns")
        return {name: _split(value) if name in names else value for name, value in values.items()}

    @model_validator(mode="after")
    def _some_bucket(self) -> Self:
        if not self.buckets or not self.kafka_bootstrap:
            raise ValueError("buckets and kafka_bootstrap each need at least one entry")
        # Only these stores' rules can be read, kept and written without loss.
        if not all(re.fullmatch(r"arn:(minio|rustfs):sqs:[^:]*:[^:]+:[a-z]+", arn) for arn in self.notification_arns):
            raise ValueError("notification_arns are of the form arn:minio:sqs::NAME:kafka (or rustfs)")
        return self

    @model_validator(mode="after")
    def _nothing_meant_for_tls_goes_without_it(self) -> Self:
        if self.s3_ca_file and not self.s3_endpoint.startswith("https:"):
            raise ValueError("s3_ca_file is for an s3_endpoint with https")
        if (self.milvus_ca_file or self.milvus_server_name) and not self.milvus_uri.startswith("https:"):
            raise ValueError("milvus_ca_file and milvus_server_name are for a milvus_uri with https")
        return self

    @model_validator(mode="after")
    def _kafka_security(self) -> Self:
        if bool(self.kafka_certificate_file) != bool(self.kafka_key_file):
            raise ValueError("kafka_certificate_file and kafka_key_file are needed together")
        files = self.kafka_ca_file or self.kafka_certificate_file
        if files and self.kafka_security_protocol not in ("SSL", "SASL_SSL"):
            raise ValueError("kafka_ca_file and kafka_certificate_file are for kafka_security_protocol SSL or SASL_SSL")
        given = bool(self.kafka_username), bool(self.kafka_password.get_secret_value())
        if any(given) and not self.kafka_security_protocol.startswith("SASL_"):
            raise ValueError(
                "kafka_username and kafka_password are for kafka_security_protocol SASL_SSL "
                "(or, where everybody in between may listen, SASL_PLAINTEXT)"
            )
        if self.kafka_security_protocol.startswith("SASL_") and not all(given):
            raise ValueError(f"kafka_security_protocol {self.kafka_security_protocol} needs kafka_username and kafka_password")
        return self


class ModelSettings(_Settings):
    """Which model a collection is made with, and how it runs on this host."""

    model: str = Field("efficientnet_lite0", description="Name in the model catalog. Chosen once, when the collection is made.")
    model_backend: Literal["openvino", "torch"] = Field("openvino", description="Runtime of the model.")
    model_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the model. Part of its fingerprint. bf16 needs a processor that has it."
    )
    model_threads: int = Field(0, ge=0, le=256, description="Threads of the model; 0: one for each processor.")
    weights_dir: Path | None = Field(None, description="Where weight files are looked for first; unset: the cache folder.")
    weights_sha256: str = Field(
        "",
        pattern=r"^([0-9a-f]{64})?$",
        description="sha256 of the weights, where the catalog does not know it (gl18_resnet50, sscd_resnet50, own). "
        "Part of the fingerprint.",
    )

    own_weights: str = Field("", description="Model own: its weights, a path, s3://bucket/key or an https address.")
    own_format: Literal["state_dict", "safetensors", "torchscript"] = Field(
        "state_dict", description="Model own: what that file is. TorchScript is a program: only from whom you trust."
    )
    own_network: Literal["resnet50", "efficientnet_lite0", "gl18_resnet50"] = Field(
        "resnet50", description="Model own: the network that a state dict or safetensors file holds the weights of."
    )
    own_dimension: int = Field(
        0, ge=0, le=32768, description="Model own: floats of a vector; 0: those of the network. TorchScript must be told."
    )
    own_input_pixels: int = Field(
        0, ge=0, le=2048, description="Model own: height and width of its input; 0: those of the network; TorchScript: 224."
    )
    own_mean: Numbers = Field(
        (), description="Model own: mean of red, green and blue, 0 to 255; empty: the network's; TorchScript: ImageNet's."
    )
    own_deviation: Numbers = Field((), description="Model own: deviation of red, green and blue, as the mean.")

    decode_workers: int = Field(0, ge=0, le=64, description="Decode processes; 0: one for each processor.")
    decode_timeout_seconds: float = Field(5.0, gt=0, description="Longest time to decode one picture.")
    decode_memory_mib: int = Field(1024, ge=256, description="Address space of a decode process.")
    max_object_bytes: int = Field(25 * 1024 * 1024, ge=1, description="Largest object that is read.")
    max_pixels: int = Field(50_000_000, ge=1, description="Most pixels of a picture, by its header.")
    min_side_pixels: int = Field(16, ge=1, description="Least width and height of a picture.")

    @model_validator(mode="before")
    @classmethod
    def _colours(cls, values: dict[str, object]) -> dict[str, object]:
        return {name: _split(value) if name in ("own_mean", "own_deviation") else value for name, value in values.items()}

    @model_validator(mode="after")
    def _three_colours(self) -> Self:
        if not {len(self.own_mean), len(self.own_deviation)} <= {0, 3}:
            raise ValueError("own_mean and own_deviation are three numbers each")
        if not all(0 < value <= 255 for value in self.own_deviation) or not all(0 <= value <= 255 for value in self.own_mean):
            raise ValueError("own_mean and own_deviation are on the scale of pixel values, 0 to 255; no deviation is 0")
        return self


class BridgeSettings(CommonSettings):
    """ingest_bridge: notifications in, object events out."""

    bridge_host: str = Field("127.0.0.1", description="Address of health, metrics and webhook.")
    bridge_port: Port = Field(8081, description="Port of health, metrics and webhook.")
    bridge_webhook_secret: SecretStr = Field(
        SecretStr(""), description="Secret that a store shows at POST /notifications; none: there is no webhook."
    )
    bridge_webhook_body_bytes: int = Field(1024 * 1024, ge=1024, description="Largest notification by webhook.")
    bridge_webhook_timeout_seconds: float = Field(
        10.0, gt=0, description="Longest wait of a webhook for its body, and again for the broker."
    )
    bridge_canary_interval_seconds: float = Field(
        300.0, ge=0, description="Time between two trials whether each bucket's changes are still announced; 0: none."
    )
    seaweedfs_filer: str = Field("127.0.0.1:8888.18888", description="SeaweedFS filer, host:http-port.grpc-port.")
    seaweedfs_weed: str = Field("weed", description="Path of the weed program.")
    seaweedfs_config_dir: Path | None = Field(None, description="Folder of the filer's security.toml.")
    follow_overlap_seconds: float = Field(5.0, ge=0, description="How much of the log is read again at a start.")
    bucket_poll_seconds: float = Field(5.0, gt=0, description="Time between looks for buckets that were added or taken away.")
    scan_interval_seconds: float = Field(900.0, ge=1, description="Time between scans of each bucket.")
    scan_backlog_seconds: float = Field(1.0, gt=0, description="Outstanding work that a scan may put before a new picture.")
    scan_backlog_events: int = Field(64, ge=1, description="Outstanding events that a scan may always have.")
    scan_removal_limit: int = Field(
        100, ge=0, description="A scan that would remove more objects than this and more than the share stops."
    )
    scan_removal_share: float = Field(0.2, ge=0, le=1, description="Share of all objects for the limit above.")
    deleted_retention_days: int = Field(45, ge=31, description="How long deleted rows are kept: longer than any topic.")


class ProcessorSettings(CommonSettings, ModelSettings):
    """processors: object events in; vectors, rows and outcomes out."""

    processor_host: str = Field("127.0.0.1", description="Address of health and metrics.")
    processor_port: Port = Field(8082, description="Port of health and metrics.")
    processor_data_dir: Path = Field(
        Path(".image-search/embedded/worker"), description="Scratch folder of the consumer, one for each process."
    )
    batch_size: int = Field(64, ge=1, le=1000, description="Most events of a batch. Batches form by what waits.")
    batches_in_flight: int = Field(
        2, ge=1, le=8, description="Batches worked on at once, so that reading and embedding overlap."
    )
    queue_events: int = Field(256, ge=1, description="Events taken from the broker and not yet in a batch.")
    batch_bytes: int = Field(128 * 1024 * 1024, ge=1, description="Bytes of pictures held by a batch at once.")
    read_concurrency: int = Field(8, ge=1, le=256, description="Objects read at once by a batch.")
    read_give_up_seconds: float = Field(
        30.0, gt=0, description="An object unreadable for this long, its store being well, fails."
    )
    include: Names = Field(("*",), description="Patterns of keys that are pictures, comma-separated.")
    exclude: Names = Field((), description="Patterns of keys that are ignored, comma-separated.")
    session_timeout_seconds: float = Field(10.0, ge=6, description="A worker silent for this long loses its partitions.")
    max_poll_interval_hours: float = Field(24.0, gt=0, description="Longest store outage that a worker sits out.")
    watchdog_seconds: float = Field(300.0, gt=0, description="Lag without any progress for this long ends the process.")

    @model_validator(mode="before")
    @classmethod
    def _patterns(cls, values: dict[str, object]) -> dict[str, object]:
        return {name: _split(value) if name in ("include", "exclude") else value for name, value in values.items()}


class QuerySettings(CommonSettings, ModelSettings):
    """query_service: search and events over HTTP."""

    query_host: str = Field(
        "127.0.0.1", description="Address of the API. Anything but loopback is for behind a proxy with keys."
    )
    query_port: Port = Field(8080, description="Port of the API, page, health and metrics.")
    max_limit: int = Field(1000, ge=1, le=1000, description="Most hits of a search and most entries of a page.")
    default_limit: int = Field(20, ge=1, le=1000, description="Hits of a search that names no limit.")
    queries_at_once: int = Field(16, ge=1, description="Searches worked on at once.")
    queries_waiting: int = Field(64, ge=0, description="Searches that may wait for their turn; the next one gets 429.")
    body_bytes_at_once: int = Field(
        256 * 1024 * 1024, ge=1, description="Bytes of query pictures held at once; a request that would pass it gets 429."
    )
    body_timeout_seconds: float = Field(30.0, gt=0, description="Longest time for a client to send its body.")
    contents_at_once: int = Field(16, ge=1, description="Pictures sent at once from the bucket; below s3_connections.")
    contents_waiting: int = Field(256, ge=0, description="Pictures that may wait to be sent; the next one gets 429.")
    wait_timeout_seconds: float = Field(10.0, gt=0, description="Longest wait of wait_for.")
    event_readers: int = Field(64, ge=1, description="Event streams open at once; the next one gets 429.")
    event_heartbeat_seconds: float = Field(15.0, gt=0, description="Time between heartbeats of an idle event stream.")
    visibility_bound_seconds: float = Field(
        0.5, ge=0, description="Longest time from an acknowledged vector to its being found."
    )

    @model_validator(mode="after")
    def _bodies_fit(self) -> Self:
        if self.body_bytes_at_once < self.max_object_bytes:
            raise ValueError("body_bytes_at_once must be at least max_object_bytes, or the largest picture never gets in")
        return self


class ClientSettings(_Settings):
    """What the command line needs to reach a running deployment."""

    query_url: str = Field("http://127.0.0.1:8080", pattern=r"^https?://[^/]+$", description="Address of the query service.")


class StackSettings(_Settings):
    """The servers and services that `image-search up` runs on this machine. The ports of services are theirs (see above).

    All ports lie below the range that outgoing connections are given (32768 on Linux), or one of those could take a port first.
    """

    cache_dir: Path = Field(default_factory=_cache_dir, description="Downloads and converted models, kept between deployments.")
    buckets: Names = Field(("images",), description="Buckets that are followed, comma-separated. Samples go into the first.")
    kafka_topic_prefix: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="Put before each topic and consumer group."
    )

    query_port: Port = Field(8080, description="Port of the API, page, health and metrics.")
    bridge_port: Port = Field(8081, description="Port of the bridge's health and metrics.")
    processor_port: Port = Field(8082, description="Port of the worker's health and metrics.")
    workers: int = Field(1, ge=1, le=32, description="Worker processes; each takes the next port after processor_port.")

    s3_port: Port = Field(9000, description="Local SeaweedFS or MinIO: S3.")
    s3_grpc_port: Port = Field(19000, description="Local SeaweedFS: S3, between its parts.")
    filer_port: Port = Field(8888, description="Local SeaweedFS: filer.")
    filer_grpc_port: Port = Field(18888, description="Local SeaweedFS: filer's metadata log.")
    master_port: Port = Field(9333, description="Local SeaweedFS: master.")
    master_grpc_port: Port = Field(19333, description="Local SeaweedFS: master, between its parts.")
    volume_port: Port = Field(9340, description="Local SeaweedFS: volumes.")
    volume_grpc_port: Port = Field(19340, description="Local SeaweedFS: volumes, between its parts.")
    admin_port: Port = Field(9350, description="Local SeaweedFS: maintenance.")
    admin_grpc_port: Port = Field(19350, description="Local SeaweedFS: maintenance, between its parts.")
    object_store_gib: int = Field(20, ge=1, description="Local SeaweedFS: most disk that objects may take, in GiB.")

    kafka_port: Port = Field(9092, description="Local Kafka: clients.")
    kafka_controller_port: Port = Field(9093, description="Local Kafka: its controller.")
    kafka_heap_mib: int = Field(256, ge=128, description="Local Kafka: heap of the Java machine, in MiB.")

    milvus_port: Port = Field(19530, description="Local Milvus: clients.")
    milvus_metrics_port: Port = Field(19522, description="Local Milvus: metrics.")
    milvus_etcd_port: Port = Field(19520, description="Local Milvus: its etcd.")
    milvus_etcd_peer_port: Port = Field(19521, description="Local Milvus: its etcd, peers.")
    milvus_proxy_port: Port = Field(19529, description="Local Milvus: proxy, between its parts.")
    milvus_root_coord_port: Port = Field(19523, description="Local Milvus: root coordinator.")
    milvus_query_coord_port: Port = Field(19524, description="Local Milvus: query coordinator.")
    milvus_query_node_port: Port = Field(19525, description="Local Milvus: query node.")
    milvus_index_node_port: Port = Field(19526, description="Local Milvus: index node.")
    milvus_data_coord_port: Port = Field(19527, description="Local Milvus: data coordinator.")
    milvus_data_node_port: Port = Field(19528, description="Local Milvus: data node.")

    mariadb_port: Port = Field(13306, description="Local MariaDB: clients.")

    stack_tls: bool = Field(
        False,
        description="Profile full: TLS and passwords between all parts, an account for each service with only what it needs.",
    )
    server_start_seconds: float = Field(180.0, gt=0, description="Longest time for a local server or service to become ready.")

    @model_validator(mode="before")
    @classmethod
    def _comma_separated(cls, values: dict[str, object]) -> dict[str, object]:
        return {name: _split(value) if name == "buckets" else value for name, value in values.items()}

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        names: dict[int, str] = {}
        more_workers = {f"processor_port + {more}": port for more, port in enumerate(self.processor_ports()) if more}
        for name, port in (self.ports() | more_workers).items():
            if port > LAST_PORT:
                raise ValueError(f"{name} is {port}, the last port is {LAST_PORT}")
            if port in names:
                raise ValueError(f"{names[port]} and {name} are both {port}")
            names[port] = name
        return self

    def ports(self) -> dict[str, int]:
        """Every port that has a setting, by its name. Further workers take the ports behind the first one's."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_port")}

    def processor_ports(self) -> list[int]:
        """The port of each worker."""
        return [self.processor_port + number for number in range(self.workers)]


AnySettings = TypeVar("AnySettings", bound=_Settings)


def load(kind: type[AnySettings], *, state_dir: Path = DEFAULT_STATE_DIR, **given: object) -> AnySettings:
    """Read and check the settings of a service. Raises ConfigurationError that names each variable that is wrong.

    `given`: fields that were named on the command line, which goes before all else.
    """
    stack_file = state_dir / STACK_FILE_NAME
    try:
        values: dict[str, Any] = {
            "_env_file": stack_file if stack_file.is_file() else None,
            **_secrets_from_files(kind),
            **given,
        }
        return kind(**values)
    except ValidationError as error:
        lines = [
            f"{ENV_PREFIX}{'.'.join(map(str, item['loc'])).upper() or '*'}: {item['msg']}"
            for item in error.errors(include_input=False)
        ]
        raise ConfigurationError("settings are not valid:\n  " + "\n  ".join(lines)) from None


def _secrets_from_files(kind: type[_Settings]) -> dict[str, SecretStr]:
    found: dict[str, SecretStr] = {}
    for name, declared in kind.model_fields.items():
        path = os.environ.get(f"{ENV_PREFIX}{name.upper()}_FILE")
        if path and declared.annotation is SecretStr:
            try:
                found[name] = SecretStr(Path(path).read_text().strip())
            except OSError as error:
                raise ConfigurationError(f"{ENV_PREFIX}{name.upper()}_FILE: cannot read {path}: {error.strerror}") from None
    return found
