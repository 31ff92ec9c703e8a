"""Search by picture, by a stored object, by examples; several searches at once; two pictures compared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from aiohttp import web

from infra.metadata_store.interface import ImageRow
from query_service.endpoint import JSON, Endpoint, answer, parse, query_of, unique
from query_service.errors import RequestRefused, refusal_of
from query_service.hit_details import with_details
from query_service.json_body import read_json
from query_service.keys import MODELS, SEARCHES, SETTINGS
from query_service.middlewares import REQUEST_ID
from query_service.request import grant_of, limit_of, row_of, row_with_id, wait_if_asked
from query_service.search import Picture, Searcher, SearchRequest, Sought
from query_service.upload import read_upload
from schemas.access import Scope
from schemas.api import LARGEST_WINDOW, ErrorCode, SearchAnswer, SearchParameters, SimilarParameters
from schemas.api_search import (
    BatchAnswer,
    BatchBody,
    BatchResult,
    CompareAnswer,
    CompareBody,
    SearchBody,
    Source,
)
from schemas.identity import object_id_from_hex
from schemas.vectors import distance_of, score_of

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

_JSON_BYTES = 256 * 1024
"""Of a JSON body beside the pictures in it."""


async def search(request: web.Request) -> web.Response:
    settings, searches = request.app[SETTINGS], request.app[SEARCHES]
    query = query_of(request)
    # Before the body is read: a wrong parameter should not cost an upload.
    parse(SearchParameters, query)
    with searches.admit() as ticket:
        if request.content_type == JSON:
            if query:
                raise RequestRefused(ErrorCode.INVALID_REQUEST, "Beside a JSON body there are no parameters: they go into it.")
            body = await read_json(request, SearchBody, ticket=ticket, max_bytes=_most(request))
            return answer(await _search_body(request, body))
        upload = await read_upload(
            request, ticket, max_bytes=settings.max_object_bytes, timeout_seconds=settings.body_timeout_seconds
        )
        parameters = parse(SearchParameters, unique([*query.items(), *upload.fields]))
        wanted = _request(request, parameters, strong=parameters.wait_for is not None)
        await wait_if_asked(request, parameters.wait_for)
        return answer(await _found(request, [(1.0, Picture(upload.picture, parameters.box))], wanted, parameters.model))


async def similar(request: web.Request) -> web.Response:
    parameters = parse(SimilarParameters, query_of(request))
    wanted = _request(request, parameters, strong=False)
    with request.app[SEARCHES].admit():
        return answer(await _found(request, [(1.0, await row_of(request))], wanted, parameters.model))


async def search_batch(request: web.Request) -> web.Response:
    with request.app[SEARCHES].admit() as ticket:
        body = await read_json(request, BatchBody, ticket=ticket, max_bytes=_most(request))
        return answer(BatchAnswer(results=await asyncio.gather(*(_one_of_batch(request, one) for one in body.searches))))


async def _one_of_batch(request: web.Request, body: SearchBody) -> BatchResult:
    try:
        return BatchResult(status=200, answer=await _search_body(request, body))
    except Exception as error:
        refusal = refusal_of(error)
        return BatchResult(status=refusal.code.status, error=refusal.answer(request[REQUEST_ID]))


async def compare(request: web.Request) -> web.Response:
    searches = request.app[SEARCHES]
    with searches.admit() as ticket:
        body = await read_json(request, CompareBody, ticket=ticket, max_bytes=_most(request))
        one, other = [await _sought(request, source) for source in (body.one, body.other)]
        async with searches.turn, request.app[MODELS].in_use() as searchers:
            searcher = _of_model(searchers, body.model)
            similarity = await searcher.similarity(one, other)
    score, distance = round(score_of(similarity), 4), round(distance_of(similarity), 6)
    return answer(CompareAnswer(score=score, distance=distance, model=searcher.model.name))


async def _search_body(request: web.Request, body: SearchBody) -> SearchAnswer:
    wanted = _request(request, body, strong=body.wait_for is not None)
    await wait_if_asked(request, body.wait_for)
    examples = [(weight, await _sought(request, source)) for weight, source in body.examples]
    return await _found(request, examples, wanted, body.model)


async def _found(
    request: web.Request, examples: Sequence[tuple[float, Sought]], wanted: SearchRequest, model: str | None
) -> SearchAnswer:
    async with request.app[SEARCHES].turn, request.app[MODELS].in_use() as searchers:
        found = await _of_model(searchers, model).search(examples, wanted)
    return await with_details(request, found, wanted.include)


async def _sought(request: web.Request, source: Source) -> Sought:
    """Raises RequestRefused (IMAGE_NOT_FOUND)."""
    if source.base64 is not None:
        return Picture(source.base64, source.box)
    if source.id is not None:
        row: ImageRow = await row_with_id(request, object_id_from_hex(source.id))
        return row
    return np.array(source.vector, dtype=np.float32)


def _of_model(searchers: Sequence[Searcher], name: str | None) -> Searcher:
    """The active one, or one that is kept beside it. Raises RequestRefused (MODEL_NOT_FOUND)."""
    if name is None:
        return searchers[0]
    for searcher in searchers:
        if searcher.model.name == name or (len(name) >= 8 and searcher.model.fingerprint.startswith(name)):
            return searcher
    known = [{"name": one.model.name, "fingerprint": one.model.fingerprint} for one in searchers]
    raise RequestRefused(ErrorCode.MODEL_NOT_FOUND, "There is no such model here.", details={"models": known})


def _request(request: web.Request, parameters: SimilarParameters | SearchBody, *, strong: bool) -> SearchRequest:
    limit = limit_of(request, parameters.limit)
    if parameters.offset + limit > LARGEST_WINDOW:
        problem = f"offset and limit together are at most {LARGEST_WINDOW}"
        raise RequestRefused(
            ErrorCode.INVALID_REQUEST,
            f"{problem}: narrow the search by a filter instead of paging so far.",
            details={"parameters": [{"parameter": "offset", "problem": problem}]},
        )
    least = [parameters.min_score] if parameters.min_score is not None else []
    if parameters.max_distance is not None:
        # The two say the same in other words: distance is 2 - 2 cos, score 100 cos.
        least.append(100.0 - 50.0 * parameters.max_distance)
    return SearchRequest(
        limit=limit,
        offset=parameters.offset,
        min_score=max(least, default=None),
        grouped=parameters.group_by is not None,
        include=parameters.include,
        narrow=grant_of(request).narrowed(parameters.narrow),
        strong=strong,
    )


def _most(request: web.Request) -> int:
    """Base64 takes four bytes for three. All pictures of a body together are as large as one may be."""
    return request.app[SETTINGS].max_object_bytes * 4 // 3 + _JSON_BYTES


_SEARCH_ERRORS = (
    *PICTURE_ERRORS,
    ErrorCode.INVALID_FILTER,
    ErrorCode.INVALID_VECTOR,
    ErrorCode.IMAGE_NOT_FOUND,
    ErrorCode.IMAGE_NOT_INDEXED,
    ErrorCode.MODEL_NOT_FOUND,
    ErrorCode.INVALID_WAIT_FOR,
    ErrorCode.WAIT_TIMEOUT,
    ErrorCode.TOO_MANY_REQUESTS,
    ErrorCode.STORE_UNAVAILABLE,
)

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/search",
        search,
        "Search by a picture that is sent along, or by what a JSON body names",
        SearchAnswer,
        scope=Scope.SEARCH,
        parameters=SearchParameters,
        errors=_SEARCH_ERRORS,
        takes_picture=True,
        body=SearchBody,
    ),
    Endpoint(
        "POST",
        "/v1/search/batch",
        search_batch,
        "Several searches at once, each with a status of its own",
        BatchAnswer,
        scope=Scope.SEARCH,
        errors=(ErrorCode.TOO_MANY_REQUESTS,),
        body=BatchBody,
    ),
    Endpoint(
        "POST",
        "/v1/compare",
        compare,
        "How alike two pictures, objects or vectors are",
        CompareAnswer,
        scope=Scope.SEARCH,
        errors=_SEARCH_ERRORS,
        body=CompareBody,
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
            ErrorCode.MODEL_NOT_FOUND,
            ErrorCode.INVALID_FILTER,
            ErrorCode.TOO_MANY_REQUESTS,
            ErrorCode.STORE_UNAVAILABLE,
        ),
    ),
)
