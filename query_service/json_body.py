"""JSON that clients send: bounded before it is parsed, and every mistake named by its place."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from aiohttp import hdrs, web
from aiohttp.http import HttpProcessingError
from pydantic import BaseModel, ValidationError

from query_service.endpoint import JSON
from query_service.errors import RequestRefused, invalid_parameters
from schemas.api import ErrorCode

Body = TypeVar("Body", bound=BaseModel)

MOST_BYTES = 64 * 1024
TIMEOUT_SECONDS = 10.0


async def read_json(request: web.Request, model: type[Body]) -> Body:
    """Raises RequestRefused: UNSUPPORTED_MEDIA_TYPE, UNSUPPORTED_CONTENT_ENCODING, BODY_TOO_LARGE, BODY_TIMEOUT, INVALID_BODY,
    INVALID_REQUEST."""
    if request.content_type != JSON:
        raise RequestRefused(ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"Send {JSON}.", details={"accepted": [JSON]})
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise RequestRefused(ErrorCode.UNSUPPORTED_CONTENT_ENCODING, "Send the body without a Content-Encoding.")
    try:
        # The parser goes no deeper than 200 levels.
        return model.model_validate_json(await _read(request))
    except ValidationError as error:
        if any(not problem["loc"] and problem["type"] == "json_invalid" for problem in error.errors()):
            raise RequestRefused(ErrorCode.INVALID_BODY, "The body is no JSON.") from None
        raise invalid_parameters(error) from None


async def _read(request: web.Request) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise RequestRefused(
                        ErrorCode.BODY_TOO_LARGE,
                        f"More than {MOST_BYTES} bytes are not taken.",
                        details={"max_bytes": MOST_BYTES},
                    )
    except TimeoutError:
        raise RequestRefused(ErrorCode.BODY_TIMEOUT, f"The body did not arrive within {TIMEOUT_SECONDS:g} s.") from None
    except (HttpProcessingError, web.RequestPayloadError):
        raise RequestRefused(ErrorCode.INVALID_BODY, "The body broke off.") from None
    return bytes(data)
