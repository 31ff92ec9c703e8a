"""The certificates of a stack with TLS: a CA of its own, and one certificate for all servers of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.local_stack.folder import write_private
from infra.settings import StackSettings

HOST = "127.0.0.1"
VALID = timedelta(days=825)
# Renewed at a start this long before they end: a stack seldom stays up longer.
RENEWED_BEFORE = timedelta(days=90)
# Clocks of machines differ a little.
_VALID_SINCE = timedelta(hours=1)

_NO_USAGE = dict.fromkeys(
    (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
)


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of a folder. Clients need `ca` only."""

    folder: Path

    @classmethod
    def of(cls, root: Path, settings: StackSettings) -> Certificates | None:
        """None for a stack whose parts talk in the clear."""
        return cls(root / "certificates") if settings.stack_tls else None

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def server(self) -> Path:
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    @property
    def keystore(self) -> Path:
        """Key and chain in one file, as Kafka wants them."""
        return self.folder / "keystore.pem"

    def prepare(self) -> None:
        """Make them at the first start, and anew when they are about to end."""
        if self.keystore.exists() and datetime.now(UTC) < _end_of(self.server) - RENEWED_BEFORE:
            return
        self.folder.mkdir(mode=0o700, exist_ok=True)
        ca, server, key = (text.decode() for text in _made())
        # The last one says that all are there.
        for path, text in ((self.ca, ca), (self.server, server), (self.key, key), (self.keystore, key + server + ca)):
            write_private(path, text)


def _end_of(path: Path) -> datetime:
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc


def _made() -> tuple[bytes, bytes, bytes]:
    """CA, server's certificate and its key. The CA's own key is forgotten: nobody can make another certificate of it."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("image-search stack", HOST))
    ca = (
        _unsigned(ca_name, ca_name, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True}), critical=True)
        .sign(ca_key, SHA256())
    )
    server = (
        _unsigned(name, ca_name, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST)), x509.DNSName("localhost")]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, SHA256())
    )
    return (
        ca.public_bytes(Encoding.PEM),
        server.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def _unsigned(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID_SINCE)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
