"""What could not be indexed, and why; and that it is tried again."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from infra import jobs
from infra.followed_buckets import followed_buckets
from query_service.cursors import page_cursor, page_start
from query_service.endpoint import Endpoint, answer, parse, query_of
from query_service.errors import RequestRefused
from query_service.json_body import read_json
from query_service.keys import METADATA, SETTINGS
from query_service.request import grant_of, limit_of
from query_service.routes.images import image_answer
from query_service.routes.jobs import job_answer
from schemas.access import Grant, Scope
from schemas.api import ErrorCode
from schemas.api_jobs import FailurePage, FailureParameters, JobAnswer, RetryRequest
from schemas.filter import Place
from schemas.identity import object_id_from_hex
from schemas.jobs import JobPlace, RetryArguments
from schemas.tables import JobKind, RowState


async def list_failures(request: web.Request) -> web.Response:
    parameters = parse(FailureParameters, query_of(request))
    limit = limit_of(request, parameters.limit)
    grant = grant_of(request)
    narrow = grant.narrowed(parameters.narrow)
    metadata = request.app[METADATA]
    rows = await metadata.list_rows(
        bucket=narrow.bucket,
        prefix=narrow.prefix,
        where=narrow.where,
        states=(RowState.FAILED,),
        reason=parameters.reason,
        after=None if parameters.cursor is None else page_start(parameters.cursor),
        limit=limit + 1,
    )
    by_reason: dict[str, int] = {}
    for place in _within(grant, Place(parameters.bucket, parameters.prefix)):
        for reason, number in (await metadata.failures_by_reason(bucket=place.bucket, prefix=place.prefix)).items():
            by_reason[reason] = by_reason.get(reason, 0) + number
    return answer(
        FailurePage(
            failures=[image_answer(row) for row in rows[:limit]],
            by_reason=by_reason,
            limit=limit,
            next=page_cursor(rows[limit - 1].ref) if len(rows) > limit else None,
        )
    )


async def retry_failures(request: web.Request) -> web.Response:
    asked = await read_json(request, RetryRequest)
    grant, metadata = grant_of(request), request.app[METADATA]
    if asked.id is not None:
        object_id = object_id_from_hex(asked.id)
        row = (await metadata.rows([object_id])).get(object_id)
        if row is None or not grant.holds(row.ref) or row.state is RowState.DELETED:
            raise RequestRefused(ErrorCode.IMAGE_NOT_FOUND, "There is no image with this id.", details={"state": None})
        # The places of the key are what lets it look at the job afterwards.
        places = [place for place in grant.places if place.holds(row.ref)]
        arguments = RetryArguments(places=_as_asked(places), object_id=asked.id)
    else:
        buckets = await followed_buckets(request.app[SETTINGS], metadata)
        asked_of = [Place(bucket, asked.prefix) for bucket in buckets if asked.bucket in (None, bucket)]
        places = [place for one in asked_of for place in _within(grant, one)]
        arguments = RetryArguments(places=_as_asked(places), reason=asked.reason)
    return answer(job_answer(await jobs.ask(metadata, JobKind.RETRY, arguments)), status=202)


def _as_asked(places: Sequence[Place]) -> tuple[JobPlace, ...]:
    return tuple(JobPlace(bucket=place.bucket, prefix=place.prefix) for place in places if place.bucket is not None)


def _within(grant: Grant, asked: Place) -> list[Place]:
    """The parts of a place that a grant covers. Of two prefixes either one begins with the other or they share nothing."""
    if not grant.places:
        return [asked]
    return [
        Place(place.bucket, max(place.prefix, asked.prefix, key=len))
        for place in grant.places
        if asked.bucket in (None, place.bucket)
        and (place.prefix.startswith(asked.prefix) or asked.prefix.startswith(place.prefix))
    ]


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/failures",
        list_failures,
        "Objects that could not be indexed, and why",
        FailurePage,
        scope=Scope.READ,
        parameters=FailureParameters,
        errors=(ErrorCode.INVALID_FILTER, ErrorCode.INVALID_CURSOR, ErrorCode.STORE_UNAVAILABLE),
    ),
    Endpoint(
        "POST",
        "/v1/failures/retry",
        retry_failures,
        "Try failed objects again: one, those of a reason, or all",
        JobAnswer,
        scope=Scope.WRITE,
        body=RetryRequest,
        good_status=202,
        errors=(ErrorCode.IMAGE_NOT_FOUND, ErrorCode.STORE_UNAVAILABLE),
    ),
)
