"""What is said of hits beyond the search: one question to each store for all hits, and only for what was asked."""

from __future__ import annotations

from collections.abc import Set

from aiohttp import web

from infra.errors import ImageRejected
from query_service.errors import RequestRefused
from query_service.keys import METADATA, OBJECTS, SETTINGS
from query_service.request import grant_of
from schemas.api import ErrorCode, Hit, Include, SearchAnswer
from schemas.filter import Filter
from schemas.identity import ContentHash, ObjectRef, object_id_from_hex


async def with_details(request: web.Request, found: SearchAnswer, include: Set[Include]) -> SearchAnswer:
    """Raises StoreUnavailable, and RequestRefused where this deployment gives no such addresses."""
    if not include:
        return found
    hits = found.hits
    if "metadata" in include:
        hits = await _with_metadata(request, hits)
    if "duplicates" in include:
        hits = await _with_duplicates(request, hits)
    if "presigned_url" in include:
        hits = await _with_addresses(request, hits)
    return found.model_copy(update={"hits": hits})


async def _with_metadata(request: web.Request, hits: list[Hit]) -> list[Hit]:
    said = await request.app[METADATA].own_metadata([object_id_from_hex(hit.id) for hit in hits])
    return [hit.model_copy(update={"metadata": said.get(object_id_from_hex(hit.id), {})}) for hit in hits]


async def _with_duplicates(request: web.Request, hits: list[Hit]) -> list[Hit]:
    # Of what the key may see: a number tells of what lies elsewhere, too.
    within = grant_of(request).narrowed(Filter()).where
    hashes = {ContentHash(bytes.fromhex(hit.content_hash)) for hit in hits}
    counts = await request.app[METADATA].count_with_content(hashes, where=within)
    return [
        hit.model_copy(update={"duplicates": max(0, counts.get(ContentHash(bytes.fromhex(hit.content_hash)), 1) - 1)})
        for hit in hits
    ]


async def _with_addresses(request: web.Request, hits: list[Hit]) -> list[Hit]:
    settings = request.app[SETTINGS]
    if not settings.s3_public_endpoint:
        raise RequestRefused(
            ErrorCode.INVALID_REQUEST,
            "This deployment gives no presigned addresses: IMAGE_SEARCH_S3_PUBLIC_ENDPOINT is not set.",
            details={"parameters": [{"parameter": "include", "problem": "presigned_url is not given here"}]},
        )
    addressed = []
    for hit in hits:
        try:
            url = await request.app[OBJECTS].presigned_url(ObjectRef(hit.bucket, hit.key), seconds=settings.presigned_seconds)
        except ImageRejected:
            url = None
        addressed.append(hit.model_copy(update={"presigned_url": url}))
    return addressed
