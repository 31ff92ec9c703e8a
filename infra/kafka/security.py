"""What is shown to the brokers and asked of them: TLS, certificates, user and password."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any

from infra.settings import CommonSettings
from infra.tls import client_context


@dataclass(frozen=True, slots=True)
class Security:
    """`protocol` and `mechanism` in Kafka's words. `context` is there where the protocol is one of TLS."""

    protocol: str = "PLAINTEXT"
    context: ssl.SSLContext | None = None
    mechanism: str = "SCRAM-SHA-512"
    username: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def from_settings(cls, settings: CommonSettings) -> Security:
        """Raises ConfigurationError for a file that cannot be used."""
        protocol = settings.kafka_security_protocol
        context = None
        if protocol.endswith("SSL"):
            context = client_context(
                settings.kafka_ca_file,
                certificate=settings.kafka_certificate_file,
                key=settings.kafka_key_file,
                named="a file of IMAGE_SEARCH_KAFKA_CA_FILE, …_CERTIFICATE_FILE or …_KEY_FILE",
            )
        password = settings.kafka_password.get_secret_value()
        return cls(protocol, context, settings.kafka_sasl_mechanism, settings.kafka_username, password)

    @property
    def with_password(self) -> bool:
        return self.protocol.startswith("SASL_")

    @property
    def options(self) -> dict[str, Any]:
        """What every client of aiokafka is made with."""
        found: dict[str, Any] = {"security_protocol": self.protocol, "ssl_context": self.context}
        if self.with_password:
            found |= {
                "sasl_mechanism": self.mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password,
            }
        return found

    @property
    def doubts(self) -> str:
        """Why a broker may not let us in. Its library has one error for all of it."""
        doubts = ["nothing answers there", f"it does not speak {self.protocol} (IMAGE_SEARCH_KAFKA_SECURITY_PROTOCOL)"]
        if self.context is not None:
            doubts.append("its certificate is of another CA (IMAGE_SEARCH_KAFKA_CA_FILE) or for another host")
        if self.with_password:
            doubts.append("it does not take this user or password (IMAGE_SEARCH_KAFKA_USERNAME, …_PASSWORD)")
        return ", or ".join(doubts)
