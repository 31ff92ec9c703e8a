"""What the database's errors become: the ones that a person has to do something about say what."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from pymysql.err import OperationalError  # type: ignore[import-untyped]  # PyMySQL ships no types

from infra.metadata_store.engine import translated


def full_sqlite() -> Exception:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("PRAGMA max_page_count = 2")
        connection.execute("CREATE TABLE t (b BLOB)")
        with pytest.raises(sqlite3.OperationalError) as raised:
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        full_sqlite(),
        OperationalError(1021, "Disk full (/tmp/x); waiting for someone to free some space"),
        OperationalError(1114, "The table 'images' is full"),
    ],
)
def test_a_full_disk_is_called_so(error: Exception) -> None:
    assert str(translated(error)) == "metadata store is not available: the disk is full: make room where the database lies"


def test_another_fault_is_not_called_a_full_disk() -> None:
    assert "disk" not in str(translated(OperationalError(2013, "Lost connection to MySQL server during query")))
