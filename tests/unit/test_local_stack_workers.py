"""Several workers in one stack: a port and a folder of its own for each, and all ports are checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.errors import ConfigurationError
from infra.local_stack import policies, ports, servers, services
from infra.local_stack.folder import Credentials, StackFolder, write_stack_file
from infra.local_stack.stack import computed_variables
from infra.settings import ENV_PREFIX, StackSettings, load

COMMANDS = {name: ("run", name) for name in ("bridge", "worker", "serve")}
ACCOUNTS = {service: {"WHO": service} for service in policies.SERVICES}


def test_each_worker_has_a_port_and_a_folder_of_its_own(tmp_path: Path) -> None:
    settings = StackSettings.model_validate({"workers": 3, "processor_port": 20_000})
    programs = services.programs(tmp_path, settings, {"SHARED": "yes"}, COMMANDS, ACCOUNTS)
    assert [program.name for program in programs] == ["bridge", "worker", "worker-2", "worker-3", "serve"]
    workers = programs[1:4]
    assert {program.command for program in workers} == {("run", "worker")}
    own = [
        (program.environment[f"{ENV_PREFIX}PROCESSOR_PORT"], program.environment[f"{ENV_PREFIX}PROCESSOR_DATA_DIR"])
        for program in workers
    ]
    assert own == [(f"2000{number}", str(tmp_path / name)) for number, name in enumerate(["worker", "worker-2", "worker-3"])]
    assert all(program.environment["SHARED"] == "yes" for program in programs)
    assert [program.environment["WHO"] for program in programs] == ["bridge", *["worker"] * 3, "query"]


def test_the_ports_of_all_workers_are_checked() -> None:
    settings = StackSettings.model_validate({"workers": 2, "processor_port": 20_000})
    assert servers.ports_taken(servers.EMBEDDED, settings)["processor_port + 1"] == 20_001
    assert 20_001 not in servers.server_ports(servers.EMBEDDED, settings).values()
    with pytest.raises(ValidationError, match="query_port and processor_port \\+ 1 are both 20001"):
        StackSettings.model_validate({"workers": 2, "processor_port": 20_000, "query_port": 20_001})
    with pytest.raises(ValidationError, match="last port"):
        StackSettings.model_validate({"workers": 2, "processor_port": 65_535})


def test_a_taken_port_of_a_further_worker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: port != 20_001)
    monkeypatch.setattr(ports, "_holders", lambda: {20_001: "pid 7: somebody"})
    settings = StackSettings.model_validate({"workers": 2, "processor_port": 20_000})
    with pytest.raises(ConfigurationError, match=r"pid 7: somebody\n.*20001 \(IMAGE_SEARCH_PROCESSOR_PORT \+ 1\)"):
        ports.require_free(servers.ports_taken(servers.EMBEDDED, settings))


def test_the_number_of_workers_is_kept_until_another_is_given(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path, "embedded")
    folder.make()
    given = load(StackSettings, state_dir=tmp_path, workers=3)
    write_stack_file(folder, computed_variables(folder, given, Credentials.of(folder)))
    assert load(StackSettings, state_dir=tmp_path).workers == 3
    assert load(StackSettings, state_dir=tmp_path, workers=1).workers == 1
    assert services.service_ports(load(StackSettings, state_dir=tmp_path))["worker-3"] == given.processor_port + 2
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_WORKERS"):
        load(StackSettings, state_dir=tmp_path, workers=0)
