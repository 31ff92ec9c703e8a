"""Search by picture, and by a stored object."""

from __future__ import annotations

from aiohttp import web

from query_service.endpoint import Endpoint, answer, parse, query_of, unique
from query_service.keys import MODELS, SEARCHES, SETTINGS
from query_service.request import grant_of, limit_of, row_of, wait_if_asked
from query_service.search import SearchRequest
from query_service.upload import read_upload
from schemas.access import Scope
from schemas.api import ErrorCode, SearchAnswer, SearchParameters, SimilarParameters

PICTURE_ERRORS = (
    ErrorCode.MISSING_IMAGE,
    ErrorCode.INVALID_BODY,
    ErrorCode.BODY_TIMEOUT,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.UNSUPPORTED_CONTENT_ENCODING,
    ErrorCode.EMPTY_OBJECT,
    ErrorCode.NOT_AN_IMAGE,
    ErrorCode.UNSUPPORTED_FORMAT,
    ErrorCode.CORRUPT_IMAGE,
    ErrorCode.IMAGE_TOO_SMALL,
    ErrorCode.TOO_MANY_PIXELS,
    ErrorCode.OBJECT_TOO_LARGE,
    ErrorCode.DECODE_TIMEOUT,
    ErrorCode.DECODE_CRASHED,
)


async def search(request: web.Request) -> web.Response:
    settings, searches = request.app[SETTINGS], request.app[SEARCHES]
    query = query_of(request)
    # Before the body is read: a wrong parameter should not cost an upload.
    parse(SearchParameters, query)
    with searches.admit() as ticket:
        upload = await read_upload(
            request, ticket, max_bytes=settings.max_object_bytes, timeout_seconds=settings.body_timeout_seconds
        )
        parameters = parse(SearchParameters, unique([*query.items(), *upload.fields]))
        wanted = _request(request, parameters, strong=parameters.wait_for is not None)
        await wait_if_asked(request, parameters.wait_for)
        async with searches.turn, request.app[MODELS].in_use() as [searcher, *_]:
            return answer(await searcher.by_picture(upload.picture, wanted))


async def similar(request: web.Request) -> web.Response:
    wanted = _request(request, parse(SimilarParameters, query_of(request)), strong=False)
    searches = request.app[SEARCHES]
    with searches.admit():
        async with searches.turn, request.app[MODELS].in_use() as [searcher, *_]:
            return answer(await searcher.by_object(await row_of(request), wanted))


def _request(request: web.Request, parameters: SimilarParameters, *, strong: bool) -> SearchRequest:
    return SearchRequest(
        limit=limit_of(request, parameters.limit),
        min_score=parameters.min_score,
        narrow=grant_of(request).narrowed(parameters.narrow),
        strong=strong,
    )


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/search",
        search,
        "Search by a picture that is sent along",
        SearchAnswer,
        scope=Scope.SEARCH,
        parameters=SearchParameters,
        errors=(
            *PICTURE_ERRORS,
            ErrorCode.INVALID_FILTER,
            ErrorCode.INVALID_WAIT_FOR,
            ErrorCode.WAIT_TIMEOUT,
            ErrorCode.TOO_MANY_REQUESTS,
            ErrorCode.STORE_UNAVAILABLE,
        ),
        takes_picture=True,
    ),
    Endpoint(
        "GET",
        "/v1/images/{id}/similar",
        similar,
        "Search by an indexed picture, which is left out of the answer",
        SearchAnswer,
        scope=Scope.SEARCH,
        parameters=SimilarParameters,
        errors=(
            ErrorCode.INVALID_ID,
            ErrorCode.IMAGE_NOT_FOUND,
            ErrorCode.IMAGE_NOT_INDEXED,
            ErrorCode.INVALID_FILTER,
            ErrorCode.TOO_MANY_REQUESTS,
            ErrorCode.STORE_UNAVAILABLE,
        ),
    ),
)
