"""What several handlers read from a request."""

from __future__ import annotations

from aiohttp import web

from infra.metadata_store.interface import ApiKey, ImageRow, MetadataStore
from query_service.errors import RequestRefused
from query_service.keys import METADATA, SETTINGS, SETTLING
from schemas.access import EVERYTHING, Grant
from schemas.api import ErrorCode, WaitToken
from schemas.identity import ObjectId, object_id_from_hex
from schemas.tables import RowState

API_KEY = web.RequestKey("api_key", ApiKey)
"""The key that the request showed. None is there while keys are off, and on routes that ask for none."""


def grant_of(request: web.Request) -> Grant:
    """What this request may see. Whatever shows objects asks it: an object outside it is answered as if it were not there."""
    key: ApiKey | None = request.get(API_KEY)
    return EVERYTHING if key is None else key.grant


def image_id(request: web.Request) -> ObjectId:
    """Raises RequestRefused (INVALID_ID)."""
    try:
        return object_id_from_hex(request.match_info["id"])
    except ValueError:
        raise RequestRefused(ErrorCode.INVALID_ID, "An image id is 64 hexadecimal characters.") from None


async def row_of(request: web.Request) -> ImageRow:
    """The row of the image that the path names. Raises RequestRefused: INVALID_ID, IMAGE_NOT_FOUND."""
    return await row_with_id(request, image_id(request))


async def row_with_id(request: web.Request, object_id: ObjectId) -> ImageRow:
    """Raises RequestRefused (IMAGE_NOT_FOUND), also for one that the request's key may not see."""
    metadata: MetadataStore = request.app[METADATA]
    row = (await metadata.rows([object_id])).get(object_id)
    if row is not None and not grant_of(request).holds(row.ref):
        row = None
    if row is None or row.state is RowState.DELETED:
        raise RequestRefused(
            ErrorCode.IMAGE_NOT_FOUND,
            "There is no image with this id.",
            details={"state": None if row is None else row.state},
        )
    return row


def limit_of(request: web.Request, asked: int | None) -> int:
    """Raises RequestRefused when more is asked for than this deployment allows."""
    settings = request.app[SETTINGS]
    if asked is None:
        return min(settings.default_limit, settings.max_limit)
    if asked > settings.max_limit:
        raise RequestRefused(
            ErrorCode.INVALID_REQUEST,
            f"limit is at most {settings.max_limit} here.",
            details={"parameters": [{"parameter": "limit", "problem": f"more than {settings.max_limit}"}]},
        )
    return asked


async def wait_if_asked(request: web.Request, wait_for: str | None) -> None:
    """Raises RequestRefused: INVALID_WAIT_FOR, WAIT_TIMEOUT."""
    if wait_for is None:
        return
    try:
        token = WaitToken.parse(wait_for)
    except ValueError as error:
        raise RequestRefused(ErrorCode.INVALID_WAIT_FOR, f"{error}.") from None
    await request.app[SETTLING].wait(token, grant_of(request))
