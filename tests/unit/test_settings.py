"""Settings are checked, secrets stay secret, and what is written about them is what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import settings_document
from infra.errors import ConfigurationError
from infra.settings import BridgeSettings, CommonSettings, ProcessorSettings, QuerySettings, load

ROOT = Path(__file__).parents[2]


def test_configuration_page_is_what_the_code_says() -> None:
    assert (ROOT / settings_document.DOCUMENT).read_text() == settings_document.configuration_page(), (
        "run: python -m infra.settings_document"
    )


def test_example_file_is_what_the_code_says() -> None:
    assert (ROOT / settings_document.EXAMPLE).read_text() == settings_document.example_file(), (
        "run: python -m infra.settings_document"
    )


def test_every_setting_is_described_and_names_its_unit() -> None:
    for kind in (BridgeSettings, ProcessorSettings, QuerySettings):
        for name, declared in kind.model_fields.items():
            assert declared.description, name
            if declared.annotation is float and not name.endswith("_share"):
                assert name.rsplit("_", 1)[-1] in {"seconds", "hours", "second"}, name


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGE_SEARCH_BUCKETS", "a, b,")
    monkeypatch.setenv("IMAGE_SEARCH_EXCLUDE", "*.tmp,thumbs/*")
    monkeypatch.setenv("IMAGE_SEARCH_OWN_MEAN", "123.7, 116.3,103.5")
    loaded = load(ProcessorSettings, state_dir=tmp_path)
    assert loaded.buckets == ("a", "b")
    assert loaded.exclude == ("*.tmp", "thumbs/*")
    assert loaded.own_mean == (123.7, 116.3, 103.5)


def test_the_environment_wins_over_the_stack_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stack.env").write_text("IMAGE_SEARCH_DEPLOYMENT=file\nIMAGE_SEARCH_S3_REGION=north\nS3_BUCKET=images\n")
    monkeypatch.setenv("IMAGE_SEARCH_DEPLOYMENT", "environment")
    loaded = load(CommonSettings, state_dir=tmp_path)
    assert (loaded.deployment, loaded.s3_region) == ("environment", "north")


def test_a_wrong_value_is_refused_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGE_SEARCH_QUERY_PORT", "70000")
    with pytest.raises(ConfigurationError, match="IMAGE_SEARCH_QUERY_PORT"):
        load(QuerySettings, state_dir=tmp_path)


def test_a_secret_comes_from_a_file_and_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    monkeypatch.setenv("IMAGE_SEARCH_S3_SECRET_KEY_FILE", str(secret))
    loaded = load(CommonSettings, state_dir=tmp_path)
    assert loaded.s3_secret_key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(loaded)


SASL = {"kafka_security_protocol": "SASL_SSL", "kafka_username": "worker", "kafka_password": "hunter2"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kafka_username": "worker", "kafka_password": "hunter2"}, "are for kafka_security_protocol SASL_SSL"),
        ({**SASL, "kafka_security_protocol": "SSL"}, "are for kafka_security_protocol SASL_SSL"),
        ({**SASL, "kafka_password": ""}, "needs kafka_username and kafka_password"),
        ({"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_password": "x"}, "needs kafka_username and kafka_password"),
        ({"kafka_ca_file": "ca.pem"}, "SSL or SASL_SSL"),
        ({**SASL, "kafka_security_protocol": "SASL_PLAINTEXT", "kafka_ca_file": "ca.pem"}, "SSL or SASL_SSL"),
        ({"kafka_security_protocol": "SSL", "kafka_certificate_file": "me.pem"}, "needed together"),
        ({"s3_ca_file": "ca.pem"}, "s3_endpoint with https"),
        ({"milvus_ca_file": "ca.pem"}, "milvus_uri with https"),
        ({"milvus_server_name": "milvus"}, "milvus_uri with https"),
        ({"kafka_sasl_mechanism": "GSSAPI"}, "KAFKA_SASL_MECHANISM"),
    ],
)
def test_what_is_meant_for_tls_or_a_password_never_goes_without(given: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said) as refused:
        load(CommonSettings, state_dir=tmp_path, **given)
    assert "hunter2" not in str(refused.value)


def test_encrypted_and_with_a_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    monkeypatch.setenv("IMAGE_SEARCH_KAFKA_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("IMAGE_SEARCH_KAFKA_CA_FILE", "/etc/ca.pem")
    loaded = load(CommonSettings, state_dir=tmp_path, kafka_security_protocol="SASL_SSL", kafka_username="worker")
    assert loaded.kafka_password.get_secret_value() == "hunter2"
    assert loaded.kafka_ca_file == Path("/etc/ca.pem")


def test_an_empty_file_name_takes_back_what_the_stack_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stack.env").write_text("IMAGE_SEARCH_S3_ENDPOINT=https://a\nIMAGE_SEARCH_S3_CA_FILE=/etc/ca.pem\n")
    assert load(CommonSettings, state_dir=tmp_path).s3_ca_file == Path("/etc/ca.pem")
    monkeypatch.setenv("IMAGE_SEARCH_S3_CA_FILE", "")
    assert load(CommonSettings, state_dir=tmp_path).s3_ca_file is None


def test_a_secret_file_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGE_SEARCH_S3_SECRET_KEY_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="nowhere"):
        load(CommonSettings, state_dir=tmp_path)
