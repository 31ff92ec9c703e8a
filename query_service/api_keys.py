"""What an API key looks like: `isk_<id>_<secret>`. The id may be shown and logged; the whole is shown once and kept nowhere."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from infra.metadata_store.interface import ApiKey
from schemas.access import Grant

ID_BYTES = 6
SECRET_BYTES = 32
"""Far beyond guessing, so a plain hash is enough: a slow one is for secrets that people think of."""

_FORM = re.compile(r"isk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NewKey:
    """`text` is for its holder, `stored` is what we keep."""

    text: str
    stored: ApiKey

    def __repr__(self) -> str:
        return f"NewKey({self.stored.key_id})"


def new_key(name: str, grant: Grant, *, expires_at_us: int | None = None) -> NewKey:
    key_id = secrets.token_hex(ID_BYTES)
    text = f"isk_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return NewKey(text, ApiKey(key_id, _hash(text), name, grant, expires_at_us=expires_at_us))


def id_in(text: str) -> str | None:
    """The id of what has the form of a key; None for anything else."""
    found = _FORM.fullmatch(text)
    return found[1] if found else None


def opens(text: str, stored: ApiKey) -> bool:
    """In a time that does not tell how much of it was right."""
    return hmac.compare_digest(_hash(text), stored.secret_hash)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
