"""The servers and services that `image-search up` runs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from infra.settings.base import LAST_PORT, Names, Port, ServiceSettings, cache_home


class StackSettings(ServiceSettings):
    """The servers and services that `image-search up` runs on this machine. The ports of services are theirs (see above).

    All ports lie below the range that outgoing connections are given (32768 on Linux), or one of those could take a port first.
    """

    cache_dir: Path = Field(default_factory=cache_home, description="Downloads and converted models, kept between deployments.")
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
