"""What whoever runs a deployment asks of it: scans, verifications, changes of model. Each is a job; the bridge and the workers
do the work, and it goes on whatever becomes of this service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from pydantic import BaseModel

from infra import jobs
from infra.followed_buckets import followed_buckets
from infra.metadata_store.interface import Job, ModelRow
from infra.model_table import ModelChangeRefused, roll_back
from query_service.endpoint import Endpoint, Handler, answer, parse, query_of
from query_service.errors import RequestRefused
from query_service.json_body import read_json
from query_service.keys import METADATA, SETTINGS
from query_service.request import grant_of
from schemas.access import Grant, Scope
from schemas.api import ErrorCode, time_of_us
from schemas.api_jobs import JobAnswer, JobList, JobParameters, ModelAnswer, ModelList
from schemas.identity import ObjectRef
from schemas.jobs import ModelArguments, ReindexArguments, ScanArguments, VerifyArguments
from schemas.tables import JobKind


async def list_jobs(request: web.Request) -> web.Response:
    parameters = parse(JobParameters, query_of(request))
    kinds = None if parameters.kind is None else [parameters.kind]
    found = await request.app[METADATA].list_jobs(kinds=kinds, limit=parameters.limit)
    return answer(JobList(jobs=[job_answer(job) for job in found]))


async def get_job(request: web.Request) -> web.Response:
    job = await request.app[METADATA].job(request.match_info["job_id"])
    if job is None or not _may_see(grant_of(request), job):
        raise RequestRefused(ErrorCode.JOB_NOT_FOUND, "There is no job with this id.")
    return answer(job_answer(job))


def _may_see(grant: Grant, job: Job) -> bool:
    """Who has no admin key sees the retries that lie in its places: the only jobs that it can ask for."""
    if grant.allows(Scope.ADMIN):
        return True
    places = job.arguments.get("places", [])
    return job.kind == JobKind.RETRY and bool(places) and all(grant.holds(ObjectRef(**_ref(place))) for place in places)


def _ref(place: dict[str, str]) -> dict[str, str]:
    return {"bucket": place["bucket"], "key": place["prefix"]}


async def scan(request: web.Request) -> web.Response:
    arguments = await read_json(request, ScanArguments)
    await _check_followed(request, arguments.bucket)
    return await _asked(request, JobKind.SCAN, arguments)


async def verify(request: web.Request) -> web.Response:
    arguments = await read_json(request, VerifyArguments)
    if arguments.bucket is not None:
        await _check_followed(request, arguments.bucket)
    return await _asked(request, JobKind.VERIFY, arguments)


async def _check_followed(request: web.Request, bucket: str) -> None:
    followed = await followed_buckets(request.app[SETTINGS], request.app[METADATA])
    if bucket not in followed:
        raise RequestRefused(
            ErrorCode.INVALID_REQUEST, f"The bucket {bucket!r} is not followed.", details={"followed": list(followed)}
        )


def _of_model(kind: JobKind, arguments: type[BaseModel]) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return await _asked(request, kind, await read_json(request, arguments))

    handler.__name__ = f"{kind}_model"
    return handler


async def _asked(request: web.Request, kind: JobKind, arguments: BaseModel) -> web.Response:
    return answer(job_answer(await jobs.ask(request.app[METADATA], kind, arguments)), status=202)


async def list_models(request: web.Request) -> web.Response:
    rows = await request.app[METADATA].models()
    return answer(ModelList(models=[await _model_answer(request, row) for row in rows]))


async def roll_back_model(request: web.Request) -> web.Response:
    try:
        row = await roll_back(request.app[METADATA])
    except ModelChangeRefused as error:
        raise RequestRefused(ErrorCode.MODEL_CHANGE_REFUSED, f"{error}.") from None
    return answer(await _model_answer(request, row))


async def _model_answer(request: web.Request, row: ModelRow) -> ModelAnswer:
    filled, indexed = await request.app[METADATA].model_coverage(row.fingerprint)
    return ModelAnswer(
        name=row.name,
        state=row.state,
        fingerprint=row.fingerprint,
        precision=row.precision,
        backend=row.backend,
        dimension=row.dimension,
        collection=row.collection,
        filled=filled,
        indexed=indexed,
        created_at=time_of_us(row.created_at_us),
    )


def job_answer(job: Job) -> JobAnswer:
    return JobAnswer(
        job_id=job.job_id,
        kind=JobKind(job.kind),
        state=job.state,
        arguments=dict(job.arguments),
        progress=dict(job.progress),
        message=job.message,
        created_at=time_of_us(job.created_at_us),
        updated_at=time_of_us(job.updated_at_us),
    )


def _job_endpoint(
    path: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]], summary: str, body: type[BaseModel]
) -> Endpoint:
    return Endpoint(
        "POST",
        path,
        handler,
        summary,
        JobAnswer,
        scope=Scope.ADMIN,
        body=body,
        good_status=202,
        errors=(ErrorCode.STORE_UNAVAILABLE,),
    )


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/jobs",
        list_jobs,
        "Jobs, the newest first",
        JobList,
        scope=Scope.ADMIN,
        parameters=JobParameters,
        errors=(ErrorCode.STORE_UNAVAILABLE,),
    ),
    Endpoint(
        "GET",
        "/v1/jobs/{job_id}",
        get_job,
        "One job: its state, progress, and what came of it",
        JobAnswer,
        scope=Scope.WRITE,
        errors=(ErrorCode.JOB_NOT_FOUND, ErrorCode.STORE_UNAVAILABLE),
    ),
    _job_endpoint("/v1/scans", scan, "Compare a bucket with what is indexed, and mend what differs", ScanArguments),
    _job_endpoint(
        "/v1/verifications", verify, "Compare bucket, rows and vectors from outside; changes nothing", VerifyArguments
    ),
    Endpoint(
        "GET",
        "/v1/models",
        list_models,
        "The models, and how far each is filled",
        ModelList,
        scope=Scope.ADMIN,
        errors=(ErrorCode.STORE_UNAVAILABLE,),
    ),
    _job_endpoint(
        "/v1/models/reindex",
        _of_model(JobKind.REINDEX, ReindexArguments),
        "Fill a second collection with another model, while the active one answers",
        ReindexArguments,
    ),
    _job_endpoint(
        "/v1/models/compare",
        _of_model(JobKind.COMPARE, ModelArguments),
        "On how many of the ten nearest a model agrees with the active one",
        ModelArguments,
    ),
    _job_endpoint(
        "/v1/models/activate",
        _of_model(JobKind.ACTIVATE, ModelArguments),
        "Let a filled model answer, if bucket, rows and its collection are equal",
        ModelArguments,
    ),
    _job_endpoint(
        "/v1/models/drop",
        _of_model(JobKind.DROP, ModelArguments),
        "Keep a model no more, and remove its collection",
        ModelArguments,
    ),
    Endpoint(
        "POST",
        "/v1/models/rollback",
        roll_back_model,
        "Let the previous model answer again, at once",
        ModelAnswer,
        scope=Scope.ADMIN,
        errors=(ErrorCode.MODEL_CHANGE_REFUSED, ErrorCode.STORE_UNAVAILABLE),
    ),
)
