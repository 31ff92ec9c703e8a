"""Where the vector store is, how its certificate is checked, and the client of its library for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymilvus import AsyncMilvusClient  # type: ignore[import-untyped]  # it has no types

from infra.settings import CommonSettings
from infra.tls import client_context


@dataclass(frozen=True, slots=True)
class Address:
    """`ca`: of the certificate of an https server; None: one of those that gRPC brings. `server_name`: its name there."""

    uri: str
    ca: Path | None = None
    server_name: str = ""

    @classmethod
    def from_settings(cls, settings: CommonSettings) -> Address:
        """Raises ConfigurationError for a CA file that cannot be used."""
        if settings.milvus_ca_file is not None:
            client_context(settings.milvus_ca_file, named="IMAGE_SEARCH_MILVUS_CA_FILE")  # gRPC reads it late, and says little
        return cls(settings.milvus_uri, settings.milvus_ca_file, settings.milvus_server_name)

    @property
    def encrypted(self) -> bool:
        return self.uri.startswith("https:")

    def client(self, token: str, *, timeout_seconds: float) -> AsyncMilvusClient:
        """`token` is user:password."""
        options: dict[str, Any] = {"secure": True} if self.encrypted else {}
        if self.ca is not None:
            options["server_pem_path"] = str(self.ca)
        if self.server_name:
            options["server_name"] = self.server_name
        # dedicated: otherwise the library keeps one channel for all clients of a process, and never closes it.
        return AsyncMilvusClient(self.uri, token=token, dedicated=True, timeout=timeout_seconds, **options)
