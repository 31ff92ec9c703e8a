"""The TLS part of a database URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from infra.errors import ConfigurationError
from infra.metadata_store.tls import split_tls

URL = make_url("mysql+aiomysql://user:password@db.example:3306/name?charset=utf8mb4")


def test_a_url_that_asks_for_no_tls_is_left_alone() -> None:
    assert split_tls(URL) == (URL, None)


@pytest.mark.parametrize(
    "query", [{"ssl_cert": "c", "ssl_key": "k"}, {"ssl_ca": "a", "ssl_key": "k"}, {"ssl_ca": "a", "ssl_cert": "c"}]
)
def test_half_a_wish_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="only together"):
        split_tls(URL.update_query_dict(query))


def test_a_file_that_is_missing_or_none_of_tls_is_named_by_its_part(tmp_path: Path) -> None:
    nonsense = tmp_path / "ca.pem"
    nonsense.write_text("no certificate")
    for path in (nonsense, tmp_path / "missing.pem"):
        with pytest.raises(ConfigurationError, match="ssl_ca") as caught:
            split_tls(URL.update_query_dict({"ssl_ca": str(path)}))
        assert "password" not in str(caught.value)
