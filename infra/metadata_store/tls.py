"""TLS to a database server: `ssl_ca`, `ssl_cert` and `ssl_key` of its URL, as one context for both drivers."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from sqlalchemy import Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection

from infra.errors import ConfigurationError
from infra.tls import client_context

_CA, _CERTIFICATE, _KEY = "ssl_ca", "ssl_cert", "ssl_key"


def split_tls(url: URL) -> tuple[URL, ssl.SSLContext | None]:
    """The URL without its TLS part, and what that part asks for: a server with a certificate of this CA, for this host.

    `ssl_cert` and `ssl_key` are our own certificate, for servers that ask for one. Raises ConfigurationError.
    """
    plain = url.difference_update_query([_CA, _CERTIFICATE, _KEY])
    asked = {name: str(url.query[name]) for name in (_CA, _CERTIFICATE, _KEY) if name in url.query}
    if not asked:
        return url, None
    if _CA not in asked or (_CERTIFICATE in asked) != (_KEY in asked):
        raise ConfigurationError("IMAGE_SEARCH_DATABASE_URL: TLS needs ssl_ca, and ssl_cert and ssl_key only together")
    files = {name: Path(text) for name, text in asked.items()}
    context = client_context(
        files[_CA],
        certificate=files.get(_CERTIFICATE),
        key=files.get(_KEY),
        named="a file of ssl_ca, ssl_cert or ssl_key in IMAGE_SEARCH_DATABASE_URL",
    )
    return plain, context


def refuse_unencrypted(engine: Engine) -> None:
    """Each new connection of this engine (aiomysql) must be encrypted.

    It would go on without TLS when the server does not offer it, and somebody in between can take the offer away.
    PyMySQL, which runs the migrations, refuses by itself.
    """

    @event.listens_for(engine, "connect")
    def _connected(connection: DBAPIConnection, _record: object) -> None:
        # It has no public way to ask.
        stream: asyncio.StreamWriter = connection.driver_connection._writer
        if stream.get_extra_info("ssl_object") is None:
            connection.close()
            raise ConfigurationError("the database server does not offer TLS, which IMAGE_SEARCH_DATABASE_URL asks for")
