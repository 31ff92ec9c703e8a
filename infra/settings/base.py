"""What the settings classes are made of, and how one is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from infra.errors import ConfigurationError

ENV_PREFIX = "IMAGE_SEARCH_"
DEFAULT_STATE_DIR = Path(".image-search")
STACK_FILE_NAME = "stack.env"


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


LAST_PORT = 65535
Port = Annotated[int, Field(ge=1, le=LAST_PORT)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""A tuple that is written as one comma-separated value."""
Numbers = Annotated[tuple[float, ...], NoDecode, BeforeValidator(_split)]
"""The same of numbers."""
OptionalFile = Annotated[Path | None, BeforeValidator(lambda value: value or None)]
"""Empty is none: that is how an environment takes back what a file of settings gave."""


def cache_home() -> Path:
    """Folder of what is downloaded or converted once for all deployments of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image-search"


class ServiceSettings(BaseSettings):
    """Read from the environment, never changed afterwards; defaults are checked like what is given."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True, validate_default=True)


AnySettings = TypeVar("AnySettings", bound=ServiceSettings)


def load(kind: type[AnySettings], *, state_dir: Path = DEFAULT_STATE_DIR, **given: object) -> AnySettings:
    """Read and check the settings of a service. Raises ConfigurationError that names each variable that is wrong.

    `given`: fields that were named on the command line, which goes before all else.
    """
    stack_file = state_dir / STACK_FILE_NAME
    try:
        values: dict[str, Any] = {
            "_env_file": stack_file if stack_file.is_file() else None,
            **_secrets_from_files(kind),
            **given,
        }
        return kind(**values)
    except ValidationError as error:
        lines = [
            f"{ENV_PREFIX}{'.'.join(map(str, item['loc'])).upper() or '*'}: {item['msg']}"
            for item in error.errors(include_input=False)
        ]
        raise ConfigurationError("settings are not valid:\n  " + "\n  ".join(lines)) from None


def _secrets_from_files(kind: type[ServiceSettings]) -> dict[str, SecretStr]:
    found: dict[str, SecretStr] = {}
    for name, declared in kind.model_fields.items():
        path = os.environ.get(f"{ENV_PREFIX}{name.upper()}_FILE")
        if path and declared.annotation is SecretStr:
            try:
                found[name] = SecretStr(Path(path).read_text().strip())
            except OSError as error:
                raise ConfigurationError(f"{ENV_PREFIX}{name.upper()}_FILE: cannot read {path}: {error.strerror}") from None
    return found
