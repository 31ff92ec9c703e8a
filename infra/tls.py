"""What a client asks of a server's certificate: that it is of this CA, or of one that the system trusts, and for this host."""

from __future__ import annotations

import ssl
from pathlib import Path

from infra.errors import ConfigurationError


def client_context(ca: Path | None, *, certificate: Path | None = None, key: Path | None = None, named: str) -> ssl.SSLContext:
    """`ca` None: what the system trusts. `certificate` and `key` are our own, for servers that ask for one.

    Raises ConfigurationError with `named`, the setting that these files come from.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigurationError(f"{named} cannot be used ({type(error).__name__}): PEM files are needed") from None
    return context
