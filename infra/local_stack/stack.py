"""The whole stack of a profile: servers, upgrade, the three services, samples; started and ended in order."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from infra import settings as all_settings
from infra.local_stack import ports, sample_pictures, servers, services
from infra.local_stack.folder import Credentials, StackFolder, read_stack_file, write_stack_file
from infra.local_stack.reporter import Reporter
from infra.local_stack.supervisor import Supervisor, end_leftovers, run_to_end
from infra.settings import ENV_PREFIX, CommonSettings, StackSettings

UPGRADE_SECONDS = 1800.0
"""A first start downloads and converts the model."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack that runs."""

    folder: StackFolder
    settings: StackSettings
    supervisor: Supervisor
    services: CommonSettings
    """What its services use to reach the servers."""
    api_keys: str
    """Whether the query service asks for them, as its setting says."""

    @property
    def query_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.query_port}"


@asynccontextmanager
async def running(
    folder: StackFolder,
    settings: StackSettings,
    reporter: Reporter,
    *,
    samples: bool,
    servers_only: bool = False,
    hurry: asyncio.Event | None = None,
) -> AsyncIterator[Stack]:
    """Start everything, and end it when the block is left: services first, then servers, at once when `hurry` is set.

    `servers_only`: nothing that would change an index. `upgrade` runs all the same.

    Raises ConfigurationError (a port or the data is in use), DownloadFailed and ProgramFailed.
    """
    servers.require_possible(folder.profile, settings)
    with folder.locked():
        for name in end_leftovers(folder.processes_file):
            reporter.warn(f"{name} was left over from a stack that was killed, and is ended")
        ports.require_free(servers.ports_taken(folder.profile, settings))
        credentials = Credentials.of(folder)
        variables = {**_UNLESS_GIVEN, **kept_variables(folder), **computed_variables(folder, settings, credentials)}
        write_stack_file(folder, {**shell_values(folder, settings, credentials), **variables})
        accounts = {
            service: _variables(fields) for service, fields in servers.service_accounts(folder, settings, credentials).items()
        }
        # Given by name, so that this process's own environment cannot point them elsewhere.
        service_settings = CommonSettings.model_validate(
            {name.removeprefix(ENV_PREFIX).lower(): text for name, text in variables.items()}
        )
        supervisor = Supervisor(folder.logs, folder.processes_file, on_change=reporter.program_changed, hurry=hurry)
        try:
            reporter.doing(f"preparing {servers.described(folder.profile)}")
            programs = await servers.prepare(folder, settings, credentials, reporter.doing)
            reporter.doing(f"starting {servers.described(folder.profile)}")
            await supervisor.start(programs)
            await servers.make_accounts(folder, settings, credentials)
            reporter.doing("upgrading schema, topics and model")
            await run_to_end(
                "upgrade",
                command(folder, "upgrade"),
                logs=folder.logs,
                environment={**variables, **accounts["upgrade"]},
                seconds=UPGRADE_SECONDS,
                say=reporter.doing,
            )
            reporter.done("schema, topics and model are up to date")
            if not servers_only:
                reporter.doing("starting bridge, worker and query service")
                commands = {name: command(folder, name) for name in ("bridge", "worker", "serve")}
                await supervisor.start(services.programs(folder.root, settings, variables, commands, accounts))
            if samples and (put := await sample_pictures.put_if_empty(service_settings)):
                reporter.done(f"{put} sample pictures put into bucket {service_settings.buckets[0]}")
            yield Stack(folder, settings, supervisor, service_settings, variables[_API_KEYS])
        finally:
            await supervisor.stop()


# Loopback is the fence here: whoever can ask is on this machine, and could read the data's folder as well.
_API_KEYS = f"{ENV_PREFIX}API_KEYS"
_UNLESS_GIVEN = {_API_KEYS: "off"}


def computed_variables(folder: StackFolder, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """IMAGE_SEARCH_* variables that point every service and command at this stack."""
    fields = {
        **servers.addresses(folder, settings, credentials),
        "query_url": f"http://127.0.0.1:{settings.query_port}",
        "workers": str(settings.workers),
        "stack_tls": str(settings.stack_tls).lower(),
        **{name: str(port) for name, port in settings.ports().items()},
    }
    return _variables(fields)


def _variables(fields: Mapping[str, str]) -> dict[str, str]:
    return {f"{ENV_PREFIX}{name.upper()}": value for name, value in fields.items()}


def kept_variables(folder: StackFolder) -> dict[str, str]:
    """Settings that were given when this stack was started, now or earlier: data made with one model needs it again."""
    known = set(_setting_variables())
    merged = {**read_stack_file(folder), **os.environ}
    return {name: value for name, value in merged.items() if name in known}


def _setting_variables() -> Iterator[str]:
    for kind in (
        all_settings.CommonSettings,
        all_settings.ModelSettings,
        all_settings.BridgeSettings,
        all_settings.ProcessorSettings,
        all_settings.QuerySettings,
        all_settings.StackSettings,
    ):
        yield from (f"{ENV_PREFIX}{name.upper()}" for name in kind.model_fields)


def shell_values(folder: StackFolder, settings: StackSettings, credentials: Credentials) -> dict[str, str]:
    """The names that people and scripts use."""
    addresses = servers.addresses(folder, settings, credentials)
    return {
        "PROFILE": folder.profile,
        "S3_ENDPOINT": addresses["s3_endpoint"],
        "S3_ACCESS_KEY": addresses["s3_access_key"],
        "S3_SECRET_KEY": addresses["s3_secret_key"],
        "S3_BUCKET": settings.buckets[0],
        "CA_FILE": addresses["s3_ca_file"],
        "KAFKA_BOOTSTRAP": addresses["kafka_bootstrap"],
        "MILVUS_URI": addresses["milvus_uri"],
        "MILVUS_TOKEN": addresses["milvus_token"],
        "DATABASE_URL": addresses["database_url"],
        "QUERY_URL": f"http://127.0.0.1:{settings.query_port}",
    }


def command(folder: StackFolder, *arguments: str) -> tuple[str, ...]:
    """`image-search` with this stack's folder, whether or not the program is on PATH."""
    return (sys.executable, "-m", "infra.cli", "--state-dir", str(folder.state_dir.absolute()), *arguments)
