"""Users of the local Kafka, TLS, and who may do what: what a stack with TLS adds to the broker."""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

from infra.errors import StoreUnavailable
from infra.kafka.access import allow
from infra.kafka.client import KafkaBroker
from infra.kafka.connection import Connection
from infra.kafka.security import Security
from infra.local_stack import policies
from infra.local_stack.certificates import Certificates
from infra.local_stack.folder import Credentials
from infra.local_stack.program import NotReady
from infra.tls import client_context

ADMIN = "admin"
"""The broker itself, and who may do everything."""
MECHANISM = "SCRAM-SHA-512"
SCRAM_ROUNDS = 8192
PROBE_SECONDS = 4.0

_SCRAM_LOGIN = "org.apache.kafka.common.security.scram.ScramLoginModule"
_PLAIN_LOGIN = "org.apache.kafka.common.security.plain.PlainLoginModule"


def passwords(credentials: Credentials) -> dict[str, str]:
    """Of every user. Passwords are hexadecimal: none needs to be quoted anywhere."""
    services = {service: credentials.password_of(service) for service in policies.SERVICES}
    return {ADMIN: credentials.kafka_password, "minio": credentials.minio_password, **services}


def user_options(credentials: Credentials) -> list[str]:
    """What formats a data folder with these users. A stack without TLS has them too, and may be given TLS later."""
    return [part for user, password in passwords(credentials).items() for part in ("--add-scram", _scram(user, password))]


def note_users(folder: Path) -> None:
    (folder / "users").touch()


def has_users(folder: Path) -> bool:
    return (folder / "users").exists()


def _scram(user: str, password: str) -> str:
    # Salted here: a command line can be read by everybody on the machine.
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, SCRAM_ROUNDS)
    values = {"salt": base64.b64encode(salt).decode(), "saltedpassword": base64.b64encode(salted).decode()}
    quoted = ",".join(f'{name}="{value}"' for name, value in values.items())
    return f"{MECHANISM}=[name={user},iterations={SCRAM_ROUNDS},{quoted}]"


def properties(credentials: Credentials, certificates: Certificates) -> Mapping[str, object]:
    """What is added to server.properties."""
    login = f'required username="{ADMIN}" password="{credentials.kafka_password}"'
    return {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": certificates.keystore,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": certificates.ca,
        "sasl.enabled.mechanisms": MECHANISM,
        "sasl.mechanism.inter.broker.protocol": MECHANISM,
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": f"{_SCRAM_LOGIN} {login};",
        # The controller keeps SCRAM's users itself, so it cannot be entered by them before it runs.
        "listener.name.controller.sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.controller.protocol": "PLAIN",
        "listener.name.controller.plain.sasl.jaas.config": (
            f'{_PLAIN_LOGIN} {login} user_{ADMIN}="{credentials.kafka_password}";'
        ),
        # Nobody may do anything but what `grant` gives.
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": f"User:{ADMIN}",
    }


async def ready(port: int, credentials: Credentials, certificates: Certificates) -> None:
    """The broker lets us in and names itself as alive."""
    # The library writes a line for each try that fails.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    broker = KafkaBroker(_connection(port, credentials, certificates, prefix="", seconds=PROBE_SECONDS))
    try:
        await broker.check()
    except StoreUnavailable as error:
        raise NotReady(str(error)) from None
    finally:
        await broker.close()


async def grant(port: int, credentials: Credentials, certificates: Certificates, *, prefix: str, seconds: float) -> None:
    """Let every service, and MinIO, do what its policy says. Raises StoreUnavailable."""
    connection = _connection(port, credentials, certificates, prefix=prefix, seconds=seconds)
    for user in passwords(credentials):
        if user != ADMIN:
            await allow(connection, user, policies.broker(user, prefix))


def _connection(port: int, credentials: Credentials, certificates: Certificates, *, prefix: str, seconds: float) -> Connection:
    context = client_context(certificates.ca, named="the stack's CA")
    security = Security("SASL_SSL", context, MECHANISM, ADMIN, credentials.kafka_password)
    return Connection((f"127.0.0.1:{port}",), prefix, seconds, security)
