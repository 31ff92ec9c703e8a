"""The production files: each against its schema where there is one, and all of them against the code."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from pydantic import SecretStr

from infra import metrics
from infra.cli import add_service_commands, cli
from infra.local_stack import policies
from infra.metadata_store.engine import parse_url
from infra.settings import ENV_PREFIX, BridgeSettings, CommonSettings, ModelSettings, ProcessorSettings, QuerySettings, load
from query_service.routes.operations import ENDPOINTS
from schemas.tables import JobState
from schemas.topics import OBJECT_NOTIFICATIONS, OBJECTS, PROCESSOR_GROUP

# Of the development extra: a checkout whose environment is older than its lock has them not yet.

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "infra/deploy"
KUBERNETES_VERSION = "1.34"
CUSTOM_RESOURCES = ("ScaledObject", "ServiceMonitor")

# What each command is set up by: its settings, its address and its port.
ROLES: dict[str, tuple[type[CommonSettings], str]] = {
    "bridge": (BridgeSettings, "bridge"),
    "worker": (ProcessorSettings, "processor"),
    "serve": (QuerySettings, "query"),
    "upgrade": (ProcessorSettings, "processor"),
}


def _yaml(path: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / path).read_text())
    return document


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return _yaml("compose.yaml")


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run(["sh", DEPLOY / "make_secrets.sh", folder], check=True, timeout=30)
    return folder


def _ours(compose: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in compose["services"].items() if one["image"].startswith("image-search:")}


def _pods(manifests: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, pod and container; each pod here has one."""
    for document in manifests:
        if document["kind"] in ("Deployment", "Job"):
            pod = document["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            yield document["metadata"]["name"], pod, container


def _of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    found = [document for document in manifests if document["kind"] == kind]
    assert found
    return found


def _load(
    command: str, environment: Mapping[str, str], secrets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> CommonSettings:
    """The settings as the container would read them. Raises ConfigurationError for a value that is not valid."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(secrets / Path(value).name) if name.endswith("_FILE") else value)
    return load(ROLES[command][0], state_dir=tmp_path)


def _settings_names() -> set[str]:
    names = set()
    for kind in (CommonSettings, ModelSettings, BridgeSettings, ProcessorSettings, QuerySettings):
        for name, declared in kind.model_fields.items():
            names.add(f"{ENV_PREFIX}{name.upper()}")
            if declared.annotation is SecretStr:
                names.add(f"{ENV_PREFIX}{name.upper()}_FILE")
    return names


# -- compose -----------------------------------------------------------------------------------------------------------------
def test_compose_keeps_to_the_compose_specification(compose: dict[str, Any]) -> None:
    # Found, not imported: only its schema is wanted, and its program needs a newer click than Faust takes.
    package = find_spec("check_jsonschema")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(path.read_text())
    jsonschema.validators.validator_for(schema, default=jsonschema.Draft7Validator)(schema).validate(compose)


def test_every_image_has_an_exact_version(compose: dict[str, Any]) -> None:
    images = {name: one["image"] for name, one in compose["services"].items()}
    assert not [name for name, image in images.items() if not re.search(r":(v?\d+\.\d+\.\d+|RELEASE\.[\dTZ-]+)$", image)]


def test_only_the_query_service_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: one["ports"] for name, one in compose["services"].items() if "ports" in one}
    assert published == {"query": [f"127.0.0.1:8080:{QuerySettings.model_fields['query_port'].default}"]}
    assert compose["networks"]["inside"]["internal"]
    outside = {name for name, one in compose["services"].items() if "outside" in one["networks"]}
    assert outside == {"query"}


def test_everything_that_stays_has_limits_a_probe_and_comes_back(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        limits = one["deploy"]["resources"]["limits"]
        assert {"cpus", "memory"} <= set(limits), name
        if name == "upgrade":
            assert one["restart"] == "no"
        else:
            assert "test" in one["healthcheck"], name
            assert one["restart"] == "unless-stopped", name


def test_what_is_stored_and_what_is_named_is_declared(compose: dict[str, Any]) -> None:
    for kind in ("volumes", "networks"):
        used = {entry.partition(":")[0] for one in compose["services"].values() for entry in one.get(kind, ())}
        folders = {name for name in used if name.startswith(".")}
        assert used - folders == set(compose[kind])
        assert all((DEPLOY / folder).is_dir() for folder in folders)


def test_services_wait_for_the_upgrade_and_it_for_the_stores(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name in _ours(compose).keys() - {"upgrade"}:
        assert services[name]["depends_on"] == {"upgrade": {"condition": "service_completed_successfully"}}, name
    waited_for = services["upgrade"]["depends_on"]
    assert waited_for == {name: {"condition": "service_healthy"} for name in ("minio", "kafka", "mysql", "milvus")}


def test_secrets_are_files_that_the_script_makes(compose: dict[str, Any], secrets: Path) -> None:
    declared = {name: Path(one["file"]).name for name, one in compose["secrets"].items()}
    assert set(declared.values()) == {path.name for path in secrets.iterdir()}
    named = set(re.findall(r"/run/secrets/([a-z0-9_]+)", (DEPLOY / "compose.yaml").read_text()))
    assert named == set(declared)
    for name, one in compose["services"].items():
        text = json.dumps([one.get("environment"), one.get("command"), one.get("healthcheck")])
        assert set(re.findall(r"/run/secrets/([a-z0-9_]+)", text)) <= set(one.get("secrets", ())), name


def test_a_second_run_of_the_script_keeps_the_secrets(secrets: Path) -> None:
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    subprocess.run(["sh", DEPLOY / "make_secrets.sh", secrets], check=True, timeout=30)
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before
    assert secrets.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["bridge", "worker", "query", "upgrade"])
def test_the_services_take_the_settings_of_compose(
    compose: dict[str, Any], name: str, secrets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = _ours(compose)[name]
    (command,) = service["command"]
    settings = _load(command, service["environment"], secrets, monkeypatch, tmp_path)
    url = parse_url(settings.database_url.get_secret_value())
    addresses = f"{settings.s3_endpoint} {settings.milvus_uri} //{settings.kafka_bootstrap[0]} //{url.host}"
    assert set(re.findall(r"//([^:/ ]+)", addresses)) == {"minio", "milvus", "kafka", "mysql"}
    assert url.password == (secrets / "mysql_password").read_text()
    assert settings.milvus_token.get_secret_value().startswith("root:")
    if name != "upgrade":
        role = ROLES[command][1]
        assert getattr(settings, f"{role}_host") == "0.0.0.0"
        assert f"127.0.0.1:{getattr(settings, f'{role}_port')}/healthz/ready" in service["healthcheck"]["test"][-1]


def test_the_database_of_compose_is_the_one_of_the_url(compose: dict[str, Any], secrets: Path) -> None:
    url = parse_url((secrets / "database_url").read_text())
    mysql = compose["services"]["mysql"]["environment"]
    assert (url.username, url.database) == (mysql["MYSQL_USER"], mysql["MYSQL_DATABASE"])
    s3 = compose["services"]["bridge"]["environment"]["IMAGE_SEARCH_S3_ACCESS_KEY"]
    assert s3 == compose["services"]["minio"]["environment"]["MINIO_ROOT_USER"]


def test_notifications_take_both_ways_to_their_topic(compose: dict[str, Any]) -> None:
    minio = compose["services"]["minio"]
    targets = {name.rpartition("_")[2] for name in minio["environment"] if name.startswith("MINIO_NOTIFY_KAFKA_ENABLE_")}
    arns = {f"arn:minio:sqs::{target}:kafka" for target in targets}
    for name, one in _ours(compose).items():
        assert set(one["environment"]["IMAGE_SEARCH_NOTIFICATION_ARNS"].split(",")) == arns, name
    for target in targets:
        assert minio["environment"][f"MINIO_NOTIFY_KAFKA_TOPIC_{target}"] == OBJECT_NOTIFICATIONS.name
        assert minio["environment"][f"MINIO_NOTIFY_KAFKA_BROKERS_{target}"] == "kafka:9092"
    (queue,) = (value for name, value in minio["environment"].items() if "_QUEUE_DIR_" in name)
    assert [volume.partition(":")[2] for volume in minio["volumes"]] == ["/data", queue]


# -- Kubernetes --------------------------------------------------------------------------------------------------------------
def test_manifests_keep_to_the_schemas_of_kubernetes(manifests: list[dict[str, Any]]) -> None:
    checked = [document for document in manifests if document["kind"] not in CUSTOM_RESOURCES]
    for document in checked:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    assert {document["kind"] for document in checked} >= {"Deployment", "Job", "NetworkPolicy", "PodDisruptionBudget"}


def test_custom_resources_have_only_fields_that_are_documented(manifests: list[dict[str, Any]]) -> None:
    (scaled,) = _of_kind(manifests, "ScaledObject")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    known = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "advanced", "triggers"}
    assert set(scaled["spec"]) <= known
    (monitor,) = _of_kind(manifests, "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) <= {"jobLabel", "selector", "endpoints", "namespaceSelector"}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert set(endpoint) <= {"port", "path", "interval", "scheme"}


def test_workers_are_scaled_by_the_lag_of_their_group(manifests: list[dict[str, Any]]) -> None:
    (scaled,) = _of_kind(manifests, "ScaledObject")
    (configuration,) = _of_kind(manifests, "ConfigMap")
    (trigger,) = scaled["spec"]["triggers"]
    known = {"bootstrapServers", "consumerGroup", "topic", "lagThreshold", "offsetResetPolicy"}
    assert trigger["type"] == "kafka"
    assert set(trigger["metadata"]) <= known
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    assert trigger["metadata"]["topic"] == OBJECTS.name
    assert trigger["metadata"]["consumerGroup"] == PROCESSOR_GROUP
    assert trigger["metadata"]["bootstrapServers"] == configuration["data"]["IMAGE_SEARCH_KAFKA_BOOTSTRAP"]
    assert scaled["spec"]["maxReplicaCount"] == int(configuration["data"]["IMAGE_SEARCH_KAFKA_PARTITIONS"])
    worker = next(one for one in _of_kind(manifests, "Deployment") if one["metadata"]["name"] == "worker")
    assert scaled["spec"]["scaleTargetRef"]["name"] == worker["metadata"]["name"]
    assert "replicas" not in worker["spec"]


def test_pods_may_do_as_little_as_possible(manifests: list[dict[str, Any]]) -> None:
    for name, pod, container in _pods(manifests):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name


def test_probes_ask_what_the_services_answer(manifests: list[dict[str, Any]]) -> None:
    answered = {endpoint.path for endpoint in ENDPOINTS}
    health_server = (ROOT / "infra/health.py").read_text()
    for name, _, container in _pods(manifests):
        if name == "image-search-upgrade":
            continue
        (port,) = container["ports"]
        kind, role = ROLES[container["args"][0]]
        assert port == {"name": "http", "containerPort": kind.model_fields[f"{role}_port"].default}, name
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "http", name
            path = container[probe]["httpGet"]["path"]
            assert path in answered
            assert f'"{path}"' in health_server
    (monitor,) = _of_kind(manifests, "ServiceMonitor")
    assert monitor["spec"]["endpoints"][0]["path"] in answered


def test_selectors_meet_pods(manifests: list[dict[str, Any]]) -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in _of_kind(manifests, "Deployment")]
    for document in _of_kind(manifests, "Service"):
        assert any(document["spec"]["selector"].items() <= one.items() for one in labels)
    for document in _of_kind(manifests, "PodDisruptionBudget"):
        assert any(document["spec"]["selector"]["matchLabels"].items() <= one.items() for one in labels)
    assert {document["metadata"]["namespace"] for document in manifests if document["kind"] != "Namespace"} == {"image-search"}


@pytest.mark.parametrize("command", list(ROLES))
def test_the_services_take_the_settings_of_the_config_map_and_of_their_own(
    manifests: list[dict[str, Any]], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, pod, container),) = (one for one in _pods(manifests) if one[2]["args"] == [command])
    account = name.removeprefix("image-search-")
    assert account in policies.SERVICES
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "secrets")
    secrets = {secret["metadata"]["name"]: secret["stringData"] for secret in _of_kind(manifests, "Secret")}
    for file, value in secrets[volume["secret"]["secretName"]].items():
        (tmp_path / file).write_text(value)
    (configuration,) = _of_kind(manifests, "ConfigMap")
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    settings = _load(command, {**configuration["data"], **own}, tmp_path, monkeypatch, tmp_path)
    assert settings.kafka_partitions == int(configuration["data"]["IMAGE_SEARCH_KAFKA_PARTITIONS"])
    url = parse_url(settings.database_url.get_secret_value())
    user, _, _ = settings.milvus_token.get_secret_value().partition(":")
    assert {settings.s3_access_key, user, url.username} == {account}
    files = [value for variable, value in configuration["data"].items() if variable.endswith("_FILE")]
    mounted = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "secrets")
    assert {str(Path(value).parent) for value in files} == {mounted}


# -- all of them against the code ----------------------------------------------------------------------------------------------
def test_every_variable_is_a_setting() -> None:
    known = _settings_names()
    for path in [*DEPLOY.rglob("*.yaml"), DEPLOY / "Dockerfile"]:
        unknown = set(re.findall(rf"\b{ENV_PREFIX}[A-Z0-9_]+", path.read_text())) - known
        assert unknown == set(), path.name


def test_every_command_exists(compose: dict[str, Any], manifests: list[dict[str, Any]]) -> None:
    add_service_commands()
    used = [tuple(one["command"]) for one in _ours(compose).values()]
    used += [tuple(container["args"]) for _, _, container in _pods(manifests)]
    assert {command for (command,) in used} == set(ROLES) <= set(cli.commands)


def test_prometheus_asks_the_ports_of_compose(compose: dict[str, Any]) -> None:
    asked = {job["job_name"]: job["dns_sd_configs"] for job in _yaml("prometheus/prometheus.yaml")["scrape_configs"]}
    assert set(asked) == set(_ours(compose)) - {"upgrade"}
    for name, (target,) in asked.items():
        (command,) = compose["services"][name]["command"]
        kind, role = ROLES[command]
        assert target["names"] == [name]
        assert target["port"] == kind.model_fields[f"{role}_port"].default


def test_the_image_is_made_of_what_the_lock_has() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    locked = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    (left_out,) = re.findall(r"left_out='\^\((.*)\)==' ", text)
    for pattern in left_out.split("|"):
        assert any(re.fullmatch(pattern, name) for name in locked), f"{pattern} leaves nothing out any more"
    local = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["local"]
    assert [wheel for wheel in local if not re.match(rf"({left_out})[=><]", wheel)] == []
    kept = {name for name in locked if not re.fullmatch(left_out, name)}
    assert {"openvino", "faust-streaming", "pymilvus", "setuptools"} <= kept
    assert set(re.findall(r"^ARG MODEL=(.*)$", text, re.MULTILINE)) == {ModelSettings.model_fields["model"].default}
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]


# -- alerts and dashboard ------------------------------------------------------------------------------------------------------
def _samples() -> dict[str, tuple[str, ...]]:
    """Every name that a query may use, with its labels."""
    found: dict[str, tuple[str, ...]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, (Counter, Gauge, Histogram)):
            (family,) = metric.describe()
            suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[family.type]
            found |= {family.name + suffix: tuple(metric._labelnames) for suffix in suffixes}
    return found


def _rules() -> list[dict[str, Any]]:
    return [rule for group in _yaml("prometheus/alerts.yaml")["groups"] for rule in group["rules"]]


def _queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/image-search.json").read_text())
    return [
        *(rule["expr"] for rule in _rules()),
        *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]),
    ]


def test_every_metric_asked_for_is_set_by_the_code() -> None:
    known = _samples()
    for query in _queries():
        used = re.findall(r"\b(image_search_[a-z_]+)(?:\{([^}]*)\})?", query)
        assert {name for name, _ in used} <= set(known), query
        assert used or re.search(r"\bup\b", query), query
        for name, selector in used:
            assert set(re.findall(r'(\w+)\s*(?:=~|!~|=|!=)"', selector)) <= set(known[name]), query
        assert query.count("(") == query.count(")"), query
    states = {state for query in _queries() for state in re.findall(r'state="(\w+)"', query)}
    assert states <= {state.value for state in JobState}


def test_every_metric_is_looked_at() -> None:
    used = {name for query in _queries() for name in re.findall(r"\bimage_search_[a-z_]+", query)}
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in used}
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in _samples()} - families == set()


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/image-search.json").read_text())
    (source,) = _yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}


def test_every_alert_is_documented_and_no_other() -> None:
    page = (ROOT / "docs/alerts.md").read_text()
    names = [rule["alert"] for rule in _rules()]
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == names
    linked = re.findall(r"\[(\w+)\]\(alerts\.md#(\w+)\)", (ROOT / "docs/operations.md").read_text())
    assert linked == [(name, name.lower()) for name in names]
    for rule in _rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
