"""A route and what is said about it: the router and the OpenAPI document are made from the same list."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from query_service.errors import RequestRefused, invalid_parameters
from schemas.access import Open, Scope
from schemas.api import ErrorCode

Parameters = TypeVar("Parameters", bound=BaseModel)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`path` in aiohttp's and OpenAPI's common form: `/v1/images/{id}`.

    `scope` is what a key needs for it; `Open` says that it needs none, and why. `body` is the model of the JSON that is sent,
    `answer` that of the good answer, or its media type, `page` what is answered in JSON beside that. `errors` are the codes
    beside those that every route can answer with.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answer: type[BaseModel] | str
    scope: Scope | Open = field(kw_only=True)
    parameters: type[BaseModel] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[ErrorCode, ...] = ()
    takes_picture: bool = False
    page: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    takes_bytes: bool = False
    takes_patch: bool = False
    good_status: int = 200

    @property
    def route(self) -> str:
        """The path as the router takes it: a key has slashes of its own."""
        return self.path.replace("{key}", r"{key:[\s\S]+}")


def parse(model: type[Parameters], values: Mapping[str, str]) -> Parameters:
    """Raises RequestRefused with an entry for each parameter that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid_parameters(error) from None


def query_of(request: web.Request) -> dict[str, str]:
    """The query's parameters. Raises RequestRefused when one comes twice: which was meant cannot be known."""
    return unique(list(request.query.items()))


def unique(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Raises RequestRefused when a name comes twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RequestRefused(ErrorCode.INVALID_REQUEST, "A parameter is given more than once.")
    return values


def answer(model: BaseModel, status: int = 200) -> web.Response:
    return web.Response(body=model.model_dump_json().encode(), status=status, content_type=JSON, charset="utf-8")
