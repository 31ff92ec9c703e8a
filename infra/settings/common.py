"""What every service needs to know of the deployment: its stores, its topics, its logs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from infra.settings.base import Names, OptionalFile, ServiceSettings, cache_home


class CommonSettings(ServiceSettings):
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
    cache_dir: Path = Field(default_factory=cache_home, description="Downloads and converted models, kept between deployments.")

    s3_endpoint: str = Field("http://127.0.0.1:9000", pattern=r"^https?://[^/]+$", description="Object store, scheme and host.")
    s3_public_endpoint: str = Field(
        "",
        pattern=r"^(https?://[^/]+)?$",
        description="Under which scheme and host clients reach the object store: what presigned addresses name. Empty: none.",
    )
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
    milvus_index: Literal["HNSW", "IVF_FLAT", "IVF_SQ8", "FLAT"] = Field(
        "HNSW", description="Index that a collection is made with; one that exists keeps its own. See image-search tune-index."
    )
    milvus_index_links: int = Field(16, ge=2, le=2048, description="Index HNSW: links of each vector (M), when it is made.")
    milvus_index_build_effort: int = Field(
        200, ge=1, le=32768, description="Index HNSW: candidates looked at for each link (efConstruction), when it is made."
    )
    milvus_index_lists: int = Field(
        128,
        ge=1,
        le=65536,
        description="Index IVF_FLAT and IVF_SQ8: lists that vectors are put into (nlist), when it is made.",
    )
    milvus_search_effort: int = Field(
        64,
        ge=1,
        le=32768,
        description="Index HNSW: least candidates of a search (ef); never fewer than twice its limit.",
    )
    milvus_search_lists: int = Field(
        16, ge=1, le=65536, description="Index IVF_FLAT and IVF_SQ8: lists that a search looks into (nprobe)."
    )

    database_url: SecretStr = Field(
        SecretStr("sqlite+aiosqlite:///.image-search/embedded/metadata.db"),
        description="SQLAlchemy URL: sqlite+aiosqlite:///PATH or mysql+aiomysql://user:password@host:port/name; "
        "with ?ssl_ca=FILE (and &ssl_cert=FILE&ssl_key=FILE) only over TLS, to a server with a certificate of that CA.",
    )
    database_pool_size: int = Field(5, ge=1, le=100, description="Database connections of a process.")
    database_timeout_seconds: float = Field(10.0, gt=0, description="Longest wait for one transaction.")

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
