"""JSON that clients send: bounded before it is parsed, and every mistake named by its place."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from aiohttp import hdrs, web
from aiohttp.http import HttpProcessingError
from pydantic import BaseModel, ValidationError

from query_service.admission import Ticket
from query_service.endpoint import JSON
from query_service.errors import RequestRefused, invalid_parameters
from query_service.keys import SETTINGS
from schemas.api import ErrorCode

Body = TypeVar("Body", bound=BaseModel)

MOST_BYTES = 64 * 1024
PARSED_HERE_BYTES = 256 * 1024
"""A larger body is parsed on a thread: nobody else should wait for it."""


async def read_json(
    request: web.Request, model: type[Body], *, ticket: Ticket | None = None, max_bytes: int = MOST_BYTES
) -> Body:
    """Raises RequestRefused: UNSUPPORTED_MEDIA_TYPE, UNSUPPORTED_CONTENT_ENCODING, BODY_TOO_LARGE, BODY_TIMEOUT, INVALID_BODY,
    INVALID_REQUEST."""
    if request.content_type != JSON:
        raise RequestRefused(ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"Send {JSON}.", details={"accepted": [JSON]})
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise RequestRefused(ErrorCode.UNSUPPORTED_CONTENT_ENCODING, "Send the body without a Content-Encoding.")
    try:
        # The parser goes no deeper than 200 levels.
        data = await _read(request, ticket, max_bytes)
        if len(data) > PARSED_HERE_BYTES:
            return await asyncio.to_thread(model.model_validate_json, data)
        return model.model_validate_json(data)
    except ValidationError as error:
        if any(not problem["loc"] and problem["type"] == "json_invalid" for problem in error.errors()):
            raise RequestRefused(ErrorCode.INVALID_BODY, "The body is no JSON.") from None
        raise invalid_parameters(error) from None


async def _read(request: web.Request, ticket: Ticket | None, max_bytes: int) -> bytes:
    data, seconds = bytearray(), request.app[SETTINGS].body_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.content.iter_any():
                if len(data) + len(chunk) > max_bytes:
                    message = f"More than {max_bytes} bytes are not taken."
                    raise RequestRefused(ErrorCode.BODY_TOO_LARGE, message, details={"max_bytes": max_bytes})
                if ticket is not None:
                    ticket.hold(len(chunk))
                data += chunk
    except TimeoutError:
        raise RequestRefused(ErrorCode.BODY_TIMEOUT, f"The body did not arrive within {seconds:g} s.") from None
    except (HttpProcessingError, web.RequestPayloadError):
        raise RequestRefused(ErrorCode.INVALID_BODY, "The body broke off.") from None
    return bytes(data)
