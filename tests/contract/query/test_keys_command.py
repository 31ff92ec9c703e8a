"""`image-search keys` on a database of its own, and the audit line of what changes something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiohttp import web
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from query_service import app
from query_service.api_keys import id_in, new_key
from query_service.commands import keys
from query_service.endpoint import JSON, Endpoint
from schemas.access import Grant, Scope
from tests.query_http import running
from tests.query_world import QueryWorld


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGE_SEARCH_DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/metadata.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(keys, list(arguments), obj=folder / "state")


def listed(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run(folder, "list", "--json").stdout)
    return found


async def upgraded() -> None:
    from infra.metadata_store import upgrade_schema
    from infra.settings import CommonSettings, load

    await upgrade_schema(load(CommonSettings))


def test_a_key_is_made_listed_and_revoked(database: Path) -> None:
    import asyncio

    asyncio.run(upgraded())
    made = run(database, "create", "a robot", "--scope", "read", "--place", "images/a/", "--expires-days", "3")
    text = made.stdout.strip()
    key_id = id_in(text)
    assert made.exit_code == 0 and key_id is not None
    [shown] = listed(database)
    assert (shown["id"], shown["state"], shown["scopes"], shown["places"]) == (key_id, "good", ["read"], ["images/a/"])
    assert text not in run(database, "list").stdout and key_id in run(database, "list").stdout
    assert run(database, "revoke", key_id).exit_code == 0
    assert [key["state"] for key in listed(database)] == ["revoked"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "a", "--scope", "admin", "--place", "images"], "whole deployment"),
        (["create", "a", "--scope", "read", "--place", "No Bucket"], "is no place"),
        (["create", " ", "--scope", "read"], "name has"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_before_the_database(database: Path, arguments: list[str], words: str) -> None:
    assert words in str(run(database, *arguments).exception)
    assert not (database / "metadata.db").exists()


async def test_what_changes_something_is_written_down_also_when_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def change(_request: web.Request) -> web.Response:
        return web.Response(status=204)

    added = Endpoint("DELETE", "/v1/things/{id}", change, "For this test", JSON, scope=Scope.WRITE)
    monkeypatch.setattr(app, "ENDPOINTS", (*app.ENDPOINTS, added))
    world = await QueryWorld().start()
    made, narrower = (new_key("gardener", Grant.of([scope])) for scope in (Scope.WRITE, Scope.READ))
    for key in (made, narrower):
        await world.metadata.add_api_key(key.stored)
    async with running(world, api_keys="required") as client:
        with capture_logs() as lines:
            for headers in ({"X-API-Key": made.text}, {"X-API-Key": narrower.text}, {}):
                await client.delete("/v1/things/1", headers=headers)
            await client.get("/v1/images", headers={"X-API-Key": narrower.text})
    written = [(line["key"], line["path"], line["status"]) for line in lines if line["event"] == "audit"]
    ids = (made.stored.key_id, narrower.stored.key_id)
    assert written == [(ids[0], "/v1/things/1", 204), (ids[1], "/v1/things/1", 403), (None, "/v1/things/1", 401)]
