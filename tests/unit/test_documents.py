"""What is written down is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from schemas.events import ReasonCode

ROOT = Path(__file__).parents[2]


def test_every_reason_code_is_documented_and_no_other() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)) == {code.value for code in ReasonCode}


def test_every_module_has_its_line_in_the_architecture() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for package in ("schemas", "infra", "ingest_bridge", "processors", "query_service")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py" and "migrations/versions" not in str(path) and f"`{path.name}`" not in page
    ]
    assert missing == [], "ARCHITECTURE.md has one line a module"


def test_commands_in_the_readme_exist() -> None:
    page = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([a-z]+)", page, re.MULTILINE))
    declared = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets
    assert targets <= declared
