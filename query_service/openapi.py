"""The OpenAPI 3.1 document, made from the routes and the models that parse and write what crosses them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from query_service.endpoint import JSON, MERGE_PATCH, Endpoint
from query_service.guard import KEY_HEADER
from query_service.upload import FILE_FIELDS
from schemas.access import Open
from schemas.api import ErrorAnswer, ErrorCode, Readiness
from schemas.events import OutcomeEvent
from schemas.filter import FilterGroup

_REFERENCE = "#/components/schemas/{model}"
_COMMON_ERRORS = (ErrorCode.INVALID_REQUEST, ErrorCode.INTERNAL_ERROR)
_BODY_ERRORS = (
    ErrorCode.INVALID_BODY,
    ErrorCode.BODY_TIMEOUT,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.UNSUPPORTED_CONTENT_ENCODING,
)
_KEY_ERRORS = (ErrorCode.UNAUTHORIZED, ErrorCode.FORBIDDEN, ErrorCode.TOO_MANY_REQUESTS)
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key: `isk_…`."},
    "header": {"type": "apiKey", "in": "header", "name": KEY_HEADER, "description": "The same key, in a header of its own."},
}
_BINARY = {"type": "string", "format": "binary"}
_BYTES = {media_type: {"schema": _BINARY} for media_type in ("image/*", "application/octet-stream")}
_PATH_SCHEMAS = {
    "id": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"},
    "job_id": {"type": "string", "maxLength": 36},
    "bucket": {"type": "string", "minLength": 3, "maxLength": 63},
    "key": {"type": "string", "minLength": 1, "maxLength": 1024},
}

Json = dict[str, Any]


def document(endpoints: Sequence[Endpoint], *, largest_limit: int) -> bytes:
    """`largest_limit`: what this deployment allows, which may be less than the API does."""
    paths: dict[str, Json] = defaultdict(dict)
    for endpoint in endpoints:
        paths[endpoint.path][endpoint.method.lower()] = _operation(endpoint, largest_limit)
    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Image search",
                "version": version("image-search"),
                "summary": "Search by picture over what lies in a bucket, and follow what becomes of it.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {"schemas": _schemas(endpoints), "securitySchemes": _SECURITY_SCHEMES},
        }
    ).encode()


def _schemas(endpoints: Iterable[Endpoint]) -> Json:
    answers = {endpoint.answer for endpoint in endpoints if not isinstance(endpoint.answer, str)}
    bodies = {endpoint.body for endpoint in endpoints if endpoint.body is not None}
    answers |= {endpoint.page for endpoint in endpoints if endpoint.page is not None}
    written: list[type[BaseModel]] = sorted({*answers, ErrorAnswer, OutcomeEvent}, key=lambda model: model.__name__)
    models: list[tuple[type[BaseModel], Literal["serialization", "validation"]]] = [
        *((model, "serialization") for model in written),
        (FilterGroup, "validation"),
        *((body, "validation") for body in sorted(bodies, key=lambda model: model.__name__)),
    ]
    _, whole = models_json_schema(models, ref_template=_REFERENCE)
    schemas: Json = whole["$defs"]
    return schemas


def _operation(endpoint: Endpoint, largest_limit: int) -> Json:
    properties = _properties(endpoint)
    if "limit" in properties:
        properties["limit"]["maximum"] = largest_limit
    operation: Json = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "parameters": [*_path_parameters(endpoint), *_query_parameters(properties), *_header_parameters(endpoint)],
        # Either scheme will do. The names in the lists are the scopes that a key needs.
        "security": [] if isinstance(endpoint.scope, Open) else [{name: [endpoint.scope]} for name in _SECURITY_SCHEMES],
        "responses": {str(endpoint.good_status): _good(endpoint), **_errors(endpoint)},
    }
    if endpoint.takes_picture:
        operation["requestBody"] = _picture_body(properties)
    elif endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {}}
    if endpoint.body is not None:
        operation["requestBody"]["content"][JSON] = {"schema": _reference(endpoint.body)}
    elif endpoint.takes_bytes:
        operation["requestBody"] = {"required": True, "content": _BYTES}
    elif endpoint.takes_patch:
        operation["requestBody"] = {"required": True, "content": {MERGE_PATCH: {"schema": {"type": "object"}}}}
    return operation


def _path_parameters(endpoint: Endpoint) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in _PATH_SCHEMAS.items()
        if f"{{{name}}}" in endpoint.path
    ]


def _query_parameters(properties: Json) -> list[Json]:
    return [
        {"name": name, "in": "query", "required": False, **_typed(schema), "description": schema.get("description", "")}
        for name, schema in properties.items()
    ]


def _typed(schema: Json) -> Json:
    if not _is_json(schema):
        return {"schema": schema}
    examples = {f"example-{number}": {"value": value} for number, value in enumerate(schema["examples"], 1)}
    return {"content": {JSON: {"schema": schema["contentSchema"], "examples": examples}}}


def _is_json(schema: Json) -> bool:
    return schema.get("contentMediaType") == JSON


def _header_parameters(endpoint: Endpoint) -> list[Json]:
    return [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": text}
        for name, text in endpoint.headers.items()
    ]


def _properties(endpoint: Endpoint) -> Json:
    """Each parameter's schema with what it refers to written out: a query parameter has no `$defs` of its own."""
    if endpoint.parameters is None:
        return {}
    schema = endpoint.parameters.model_json_schema(mode="validation", ref_template=_REFERENCE)
    definitions = schema.get("$defs", {})

    def written_out(part: Any) -> Any:  # noqa: ANN401 - any JSON value
        match part:
            case {"contentSchema": _}:
                # JSON in a text: a filter, whose groups hold groups.
                return part
            case {"$ref": str(reference)}:
                return definitions[reference.rpartition("/")[2]]
            case dict():
                return {name: written_out(value) for name, value in part.items()}
            case list():
                # A query cannot carry null: a parameter is there or it is not.
                return [written_out(entry) for entry in part if entry != {"type": "null"}]
            case _:
                return part

    properties: Json = {name: _without_null(written_out(value)) for name, value in schema["properties"].items()}
    return properties


def _without_null(schema: Json) -> Json:
    if schema.get("default", ...) is None:
        schema.pop("default")
    choices = schema.pop("anyOf", None)
    if choices is None:
        return schema
    return {**choices[0], **schema} if len(choices) == 1 else {"anyOf": choices, **schema}


def _picture_body(properties: Json) -> Json:
    first, alias = FILE_FIELDS
    fields = {name: schema["contentSchema"] if _is_json(schema) else schema for name, schema in properties.items()}
    form = {
        "type": "object",
        "properties": {first: _BINARY, alias: _BINARY, **fields},
        "oneOf": [{"required": [first]}, {"required": [alias]}],
    }
    encoding = {name: {"contentType": JSON} for name, schema in properties.items() if _is_json(schema)}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form, "encoding": encoding},
            **_BYTES,
        },
    }


def _good(endpoint: Endpoint) -> Json:
    if isinstance(endpoint.answer, str):
        schema = {"$ref": _REFERENCE.format(model=OutcomeEvent.__name__)} if "event-stream" in endpoint.answer else {}
        page = {} if endpoint.page is None else {JSON: {"schema": _reference(endpoint.page)}}
        return {"description": endpoint.summary, "content": {endpoint.answer: {"schema": schema}, **page}}
    return {"description": endpoint.summary, "content": {JSON: {"schema": _reference(endpoint.answer)}}}


def _errors(endpoint: Endpoint) -> Json:
    by_status: dict[int, list[ErrorCode]] = defaultdict(list)
    key_errors = () if isinstance(endpoint.scope, Open) else _KEY_ERRORS
    body_errors = () if endpoint.body is None else _BODY_ERRORS
    for code in dict.fromkeys((*_COMMON_ERRORS, *key_errors, *body_errors, *endpoint.errors)):
        by_status[code.status].append(code)
    answers: Json = {
        str(status): {
            "description": ", ".join(codes),
            "content": {JSON: {"schema": _reference(ErrorAnswer)}},
            **_headers_of(status),
        }
        for status, codes in sorted(by_status.items())
    }
    if endpoint.answer is Readiness:
        answers["503"] = {"description": "Not ready", "content": {JSON: {"schema": _reference(Readiness)}}}
    return answers


def _headers_of(status: int) -> Json:
    if status == ErrorCode.UNAUTHORIZED.status:
        return {"headers": {"WWW-Authenticate": {"description": "What to show.", "schema": {"type": "string"}}}}
    if status not in (429, 503):
        return {}
    return {"headers": {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}}


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
