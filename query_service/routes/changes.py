"""What changes a bucket: a picture put, a picture deleted. The index follows as it does any other writer."""

from __future__ import annotations

import json
from contextlib import aclosing

import structlog
from aiohttp import ETag, web

from infra.errors import ImageRejected
from infra.followed_buckets import followed_buckets
from infra.object_store.interface import Over
from infra.object_store.names import check_new_key, check_place
from query_service.endpoint import JSON, MERGE_PATCH, Endpoint, answer
from query_service.errors import RequestRefused
from query_service.keys import METADATA, OBJECTS, SETTINGS, UPLOADS
from query_service.request import grant_of, row_of
from query_service.upload import body_chunks, check_raw
from schemas.access import Scope
from schemas.api import Accepted, ErrorCode, MetadataAnswer, WaitToken
from schemas.identity import ObjectRef
from schemas.metadata import LARGEST_METADATA_BYTES, Metadata, written

# Kept as they were sent. Any other is stored as bytes of no kind: a bucket may be read by browsers, and an SVG runs scripts.
_KEPT_TYPES = frozenset(
    {"image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/avif", "image/tiff", "image/heic"}
)
_BYTES = "application/octet-stream"

_CONDITION_HEADERS = {
    "If-Match": "Only if the object at this key has this ETag.",
    "If-None-Match": "`*`: only if there is no object at this key.",
}

log = structlog.get_logger(__name__)


async def put_image(request: web.Request) -> web.Response:
    settings = request.app[SETTINGS]
    size = check_raw(request, max_bytes=settings.max_object_bytes)
    over = _over(request)
    ref = await _ref_of_path(request, new=True)
    uploads = request.app[UPLOADS]
    with uploads.admit():
        async with uploads.turn, aclosing(body_chunks(request, timeout_seconds=settings.body_timeout_seconds)) as chunks:
            etag = await request.app[OBJECTS].put_stream(
                ref,
                chunks,
                size=size,
                content_type=request.content_type if request.content_type in _KEPT_TYPES else _BYTES,
                within_seconds=settings.body_timeout_seconds,
                over=over,
            )
    log.info("object_put", bucket=ref.bucket, key=ref.key, size=size, etag=etag)
    return _accepted(ref, etag)


async def delete_object(request: web.Request) -> web.Response:
    return await _deleted(request, await _ref_of_path(request, new=False))


async def delete_image(request: web.Request) -> web.Response:
    ref = (await row_of(request)).ref
    await _check_followed(request, ref.bucket)
    return await _deleted(request, ref)


async def patch_metadata(request: web.Request) -> web.Response:
    row = await row_of(request)
    patch = await _patch(request)
    try:
        whole = await request.app[METADATA].patch_own_metadata(row.object_id, patch)
    except ValueError as error:
        raise RequestRefused(ErrorCode.INVALID_METADATA, f"{error}.") from None
    log.info("metadata_changed", bucket=row.ref.bucket, key=row.ref.key)
    return answer(MetadataAnswer(id=row.object_id.hex(), metadata=whole))


async def _patch(request: web.Request) -> Metadata:
    """Raises RequestRefused: UNSUPPORTED_MEDIA_TYPE, BODY_TOO_LARGE, BODY_TIMEOUT, INVALID_BODY."""
    if request.content_type not in (MERGE_PATCH, JSON):
        raise RequestRefused(
            ErrorCode.UNSUPPORTED_MEDIA_TYPE, "Send a JSON merge patch.", details={"accepted": [MERGE_PATCH, JSON]}
        )
    body = bytearray()
    async for chunk in body_chunks(request, timeout_seconds=request.app[SETTINGS].body_timeout_seconds):
        body += chunk
        if len(body) > 2 * LARGEST_METADATA_BYTES:
            raise RequestRefused(
                ErrorCode.BODY_TOO_LARGE, "The patch is too long.", details={"max_bytes": 2 * LARGEST_METADATA_BYTES}
            )
    try:
        patch = json.loads(body)
        written(patch if isinstance(patch, dict) else {})
    except (ValueError, RecursionError):
        patch = None
    if not isinstance(patch, dict):
        raise RequestRefused(ErrorCode.INVALID_BODY, "The body is no JSON object that metadata can be.")
    return patch


async def _deleted(request: web.Request, ref: ObjectRef) -> web.Response:
    await request.app[OBJECTS].delete(ref)
    log.info("object_deleted", bucket=ref.bucket, key=ref.key)
    return _accepted(ref, None)


def _accepted(ref: ObjectRef, etag: str | None) -> web.Response:
    token = WaitToken(ref.object_id, etag)
    return answer(Accepted(id=ref.object_id.hex(), bucket=ref.bucket, key=ref.key, etag=etag, wait_for=str(token)), status=202)


async def _ref_of_path(request: web.Request, *, new: bool) -> ObjectRef:
    """Raises RequestRefused: FORBIDDEN, BUCKET_NOT_FOLLOWED, INVALID_KEY."""
    ref = ObjectRef(request.match_info["bucket"], request.match_info["key"])
    if not grant_of(request).holds(ref):
        raise RequestRefused(ErrorCode.FORBIDDEN, "This API key does not reach to this bucket and key.")
    await _check_followed(request, ref.bucket)
    try:
        if new:
            check_new_key(ref.key)
        check_place(ref)
    except ImageRejected as error:
        raise RequestRefused(ErrorCode.INVALID_KEY, f"Not a key that can be used here: {error}.") from None
    return ref


async def _check_followed(request: web.Request, bucket: str) -> None:
    followed = await followed_buckets(request.app[SETTINGS], request.app[METADATA])
    if bucket not in followed:
        # In any other bucket the change would be made and never be heard of.
        raise RequestRefused(
            ErrorCode.BUCKET_NOT_FOLLOWED, "This bucket is not followed.", details={"followed": sorted(followed)}
        )


def _over(request: web.Request) -> Over | None:
    """Raises RequestRefused (INVALID_REQUEST) for conditions that a put cannot have."""
    try:
        match, none_match = request.if_match, request.if_none_match
    except ValueError:
        raise _bad_condition() from None
    if match is None and none_match is None:
        return None
    if none_match is None and match is not None and len(match) == 1 and _is_plain(match[0]):
        return Over(match[0].value)
    if match is None and none_match is not None and [tag.value for tag in none_match] == ["*"]:
        return Over(None)
    raise _bad_condition()


def _is_plain(tag: ETag) -> bool:
    return not tag.is_weak and tag.value != "*"


def _bad_condition() -> RequestRefused:
    return RequestRefused(
        ErrorCode.INVALID_REQUEST, 'Conditions of a put are If-None-Match: * or If-Match: "<etag>", not both.'
    )


_CHANGE_ERRORS = (
    ErrorCode.BUCKET_NOT_FOLLOWED,
    ErrorCode.STORE_UNAVAILABLE,
    ErrorCode.STORE_REFUSED,
)

ENDPOINTS = (
    Endpoint(
        "PATCH",
        "/v1/images/{id}",
        patch_metadata,
        "Change what is said of an image, by a JSON merge patch (RFC 7396)",
        MetadataAnswer,
        scope=Scope.WRITE,
        errors=(
            ErrorCode.INVALID_ID,
            ErrorCode.IMAGE_NOT_FOUND,
            ErrorCode.INVALID_BODY,
            ErrorCode.INVALID_METADATA,
            ErrorCode.BODY_TIMEOUT,
            ErrorCode.BODY_TOO_LARGE,
            ErrorCode.UNSUPPORTED_MEDIA_TYPE,
            ErrorCode.STORE_UNAVAILABLE,
        ),
        takes_patch=True,
    ),
    Endpoint(
        "PUT",
        "/v1/images/{bucket}/{key}",
        put_image,
        "Put a picture into its bucket; the answer says what to wait for",
        Accepted,
        scope=Scope.WRITE,
        headers=_CONDITION_HEADERS,
        errors=(
            *_CHANGE_ERRORS,
            ErrorCode.INVALID_KEY,
            ErrorCode.INVALID_BODY,
            ErrorCode.MISSING_IMAGE,
            ErrorCode.BODY_TIMEOUT,
            ErrorCode.LENGTH_REQUIRED,
            ErrorCode.PRECONDITION_FAILED,
            ErrorCode.BODY_TOO_LARGE,
            ErrorCode.UNSUPPORTED_MEDIA_TYPE,
            ErrorCode.UNSUPPORTED_CONTENT_ENCODING,
            ErrorCode.TOO_MANY_REQUESTS,
        ),
        takes_bytes=True,
        good_status=202,
    ),
    Endpoint(
        "DELETE",
        "/v1/images/{bucket}/{key}",
        delete_object,
        "Delete what is at a key, whether or not it is known here yet",
        Accepted,
        scope=Scope.WRITE,
        errors=(*_CHANGE_ERRORS, ErrorCode.INVALID_KEY),
        good_status=202,
    ),
    Endpoint(
        "DELETE",
        "/v1/images/{id}",
        delete_image,
        "Delete a picture from its bucket",
        Accepted,
        scope=Scope.WRITE,
        errors=(*_CHANGE_ERRORS, ErrorCode.INVALID_ID, ErrorCode.IMAGE_NOT_FOUND),
        good_status=202,
    ),
)
