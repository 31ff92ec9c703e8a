"""The settings of each service and of the command line, on top of what all of them share."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from infra.settings.base import Names, Port, ServiceSettings
from infra.settings.common import CommonSettings
from infra.settings.model import ModelSettings


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


class QuerySettings(CommonSettings, ModelSettings):
    """query_service: search and events over HTTP."""

    query_host: str = Field(
        "127.0.0.1",
        description="Address of the API. Anything but loopback wants API keys, and TLS in front.",
    )
    query_port: Port = Field(8080, description="Port of the API, page, health and metrics.")
    api_keys: Literal["required", "off", "off-everywhere"] = Field(
        "required",
        description="Whether the API asks for keys. `off`: not on loopback, and it does not start on another address; "
        "`off-everywhere`: for behind a proxy that lets in only who may do everything.",
    )
    key_requests_per_second: float = Field(100.0, gt=0, description="Requests that each API key may make in the long run.")
    key_burst: int = Field(500, ge=1, description="Requests that an API key may make at once; the next one gets 429.")
    cors_origins: Names = Field(
        (), description="Other sites whose pages may ask here, comma-separated, such as https://photos.example.com."
    )
    max_limit: int = Field(1000, ge=1, le=1000, description="Most hits of a search and most entries of a page.")
    presigned_seconds: int = Field(300, ge=1, le=604_800, description="How long an address of the object store is good for.")
    default_limit: int = Field(20, ge=1, le=1000, description="Hits of a search that names no limit.")
    queries_at_once: int = Field(16, ge=1, description="Searches worked on at once.")
    queries_waiting: int = Field(64, ge=0, description="Searches that may wait for their turn; the next one gets 429.")
    queries_embedded_at_once: int = Field(
        8, ge=1, description="Most query pictures of one call of the model; those that come while it is busy share the next."
    )
    recent_query_vectors: int = Field(
        1024, ge=0, description="Vectors of query pictures that are remembered, by content hash and model; 0: none."
    )
    body_bytes_at_once: int = Field(
        256 * 1024 * 1024, ge=1, description="Bytes of query pictures held at once; a request that would pass it gets 429."
    )
    body_timeout_seconds: float = Field(30.0, gt=0, description="Longest time for a client to send its body.")
    contents_at_once: int = Field(16, ge=1, description="Pictures sent at once from the bucket; below s3_connections.")
    contents_waiting: int = Field(256, ge=0, description="Pictures that may wait to be sent; the next one gets 429.")
    uploads_at_once: int = Field(8, ge=1, description="Pictures put at once into a bucket; below s3_connections.")
    uploads_waiting: int = Field(64, ge=0, description="Pictures that may wait to be put; the next one gets 429.")
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

    @model_validator(mode="after")
    def _nobody_comes_in_without_a_key_by_mistake(self) -> Self:
        if self.api_keys == "off" and not _is_loopback(self.query_host):
            raise ValueError(
                f"api_keys=off is for loopback only, and query_host is {self.query_host}: "
                "set api_keys=required, or off-everywhere if a proxy in front lets in only who may do everything"
            )
        return self

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/*?#@]+", origin):
                raise ValueError(f"{origin!r} is no origin: write https://HOST or https://HOST:PORT")
        return origins


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ClientSettings(ServiceSettings):
    """What the command line needs to reach a running deployment."""

    query_url: str = Field("http://127.0.0.1:8080", pattern=r"^https?://[^/]+$", description="Address of the query service.")
    api_key: SecretStr = Field(SecretStr(""), description="API key that the command line shows; none: it shows none.")
