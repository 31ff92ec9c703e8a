"""Writes docs/configuration.md and .env.example from the settings: `python -m infra.settings_document`.

A test compares what stands there with what this would write, so neither can lie.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from infra import settings
from infra.settings import ENV_PREFIX

DOCUMENT = Path("docs/configuration.md")
EXAMPLE = Path(".env.example")

_SECTIONS = (
    (settings.CommonSettings, "Every service"),
    (settings.ModelSettings, "Model and decoding (worker and query service)"),
    (settings.BridgeSettings, "ingest_bridge"),
    (settings.ProcessorSettings, "processors"),
    (settings.QuerySettings, "query_service"),
    (settings.ClientSettings, "Command line"),
    (settings.StackSettings, "Local stack (`image-search up`)"),
)

_HEAD = """# Configuration

Every setting is an environment variable. A value comes from the environment, else from `.image-search/stack.env`, which
`image-search up` writes, else from the default below. A secret `X` may be given by file: `X_FILE` names the file that holds
it. A value that is not valid stops the service at its start, with the variable's name.

This page is made by `python -m infra.settings_document`.
"""


def _own_fields(kind: type[settings.AnySettings], seen: set[str]) -> Iterator[tuple[str, FieldInfo]]:
    for name, declared in kind.model_fields.items():
        if name not in seen:
            seen.add(name)
            yield name, declared


def _type_name(annotation: Any) -> str:  # noqa: ANN401 - any annotation that a setting may have
    if annotation is SecretStr:
        return "secret"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return _type_name(next(one for one in get_args(annotation) if one is not type(None)))
    if get_origin(annotation) is tuple:
        return "list, comma-separated"
    return {bool: "true or false", int: "number", float: "number", Path: "path", str: "text"}.get(annotation, "text")


def _default(declared: FieldInfo) -> str:
    if declared.default_factory is not None:
        return "~/.cache/image-search"
    value = declared.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)


def configuration_page() -> str:
    lines = [_HEAD]
    seen: set[str] = set()
    for kind, title in _SECTIONS:
        lines += [f"## {title}", "", "| variable | type | default | meaning |", "| --- | --- | --- | --- |"]
        for name, declared in _own_fields(kind, seen):
            default = _default(declared)
            shown = f"`{default}`" if default else "(empty)"
            lines.append(
                f"| `{ENV_PREFIX}{name.upper()}` | {_type_name(declared.annotation)} | {shown} | {declared.description} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def example_file() -> str:
    lines = [
        "# Every setting with its default. Made by `python -m infra.settings_document`; docs/configuration.md explains them."
    ]
    seen: set[str] = set()
    for kind, title in _SECTIONS:
        lines += ["", f"# {title.replace('`', '')}"]
        lines += [f"#{ENV_PREFIX}{name.upper()}={_default(declared)}" for name, declared in _own_fields(kind, seen)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(configuration_page())
    EXAMPLE.write_text(example_file())
