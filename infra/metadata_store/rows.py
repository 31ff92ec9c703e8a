"""Between rows of the tables and the values that the rest of the product knows."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Row

from infra.metadata_store.interface import ApiKey, ImageRow, Job, ModelRow
from schemas.access import Grant, Scope, place_from_text, place_text
from schemas.events import OutcomeEvents, ReasonCode
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef
from schemas.tables import JobState, ModelState, RowState

Values = dict[str, Any]


def key_bytes(key: str) -> bytes:
    # Surrogates stand for bytes that were not UTF-8 on their way in; identity.py keeps such keys apart in the same way.
    return key.encode("utf-8", "surrogatepass")


def image_values(row: ImageRow) -> Values:
    return {
        "object_id": row.object_id,
        "bucket": row.ref.bucket,
        "object_key": key_bytes(row.ref.key),
        "state": row.state.value,
        "content_hash": row.content_hash,
        "md5": row.md5,
        "etag": row.etag,
        "version": row.version,
        "put_time_us": row.put_time_us,
        "size": row.size,
        "format": row.format,
        "width": row.width,
        "height": row.height,
        "reason": row.reason.value if row.reason is not None else None,
        "message": row.message,
        "attempt": row.attempt,
        "generation": row.generation,
        "published_generation": row.published_generation,
        "owed_outcomes": _owed_json(row),
        "created_at_us": row.created_at_us,
        "updated_at_us": row.updated_at_us,
    }


def _owed_json(row: ImageRow) -> str | None:
    if not row.owed_outcomes:
        return None
    return OutcomeEvents.dump_json(list(row.owed_outcomes), exclude_none=True).decode()


def image_row(row: Row[Any]) -> ImageRow:
    return ImageRow(
        ref=ObjectRef(row.bucket, row.object_key.decode("utf-8", "surrogatepass")),
        state=RowState(row.state),
        generation=row.generation,
        published_generation=row.published_generation,
        content_hash=ContentHash(row.content_hash) if row.content_hash is not None else None,
        md5=row.md5,
        etag=row.etag,
        version=row.version,
        put_time_us=row.put_time_us,
        size=row.size,
        format=row.format,
        width=row.width,
        height=row.height,
        reason=ReasonCode(row.reason) if row.reason is not None else None,
        message=row.message,
        attempt=row.attempt,
        owed_outcomes=tuple(OutcomeEvents.validate_json(row.owed_outcomes)) if row.owed_outcomes else (),
        created_at_us=row.created_at_us,
        updated_at_us=row.updated_at_us,
    )


def model_values(model: ModelRow) -> Values:
    return {
        "fingerprint": model.fingerprint,
        "name": model.name,
        "collection": model.collection,
        "dimension": model.dimension,
        "backend": model.backend,
        "precision": model.precision,
        "description": json.dumps(dict(model.description)),
        "state": model.state.value,
        "created_at_us": model.created_at_us,
    }


def model_row(row: Row[Any]) -> ModelRow:
    return ModelRow(
        fingerprint=ModelFingerprint(row.fingerprint),
        name=row.name,
        collection=row.collection,
        dimension=row.dimension,
        backend=row.backend,
        precision=row.precision,
        description=json.loads(row.description),
        state=ModelState(row.state),
        created_at_us=row.created_at_us,
    )


def job_values(job: Job) -> Values:
    return {
        "job_id": job.job_id,
        "kind": job.kind,
        "arguments": json.dumps(dict(job.arguments)),
        "state": job.state.value,
        "progress": json.dumps(dict(job.progress)),
        "message": job.message,
        "owner": job.owner,
        "lease_until_us": job.lease_until_us,
        "created_at_us": job.created_at_us,
        "updated_at_us": job.updated_at_us,
    }


def job_row(row: Row[Any]) -> Job:
    return Job(
        job_id=row.job_id,
        kind=row.kind,
        arguments=json.loads(row.arguments),
        state=JobState(row.state),
        progress=json.loads(row.progress),
        message=row.message,
        owner=row.owner,
        lease_until_us=row.lease_until_us,
        created_at_us=row.created_at_us,
        updated_at_us=row.updated_at_us,
    )


def api_key_values(key: ApiKey) -> Values:
    return {
        "key_id": key.key_id,
        "secret_hash": key.secret_hash,
        "name": key.name,
        "scopes": ",".join(sorted(key.grant.scopes)),
        "places": json.dumps([place_text(place) for place in key.grant.places]),
        "created_at_us": key.created_at_us,
        "expires_at_us": key.expires_at_us,
        "last_used_at_us": key.last_used_at_us,
        "revoked_at_us": key.revoked_at_us,
    }


def api_key_row(row: Row[Any]) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        secret_hash=row.secret_hash,
        name=row.name,
        grant=Grant.of(
            (Scope(scope) for scope in row.scopes.split(",")), (place_from_text(text) for text in json.loads(row.places))
        ),
        created_at_us=row.created_at_us,
        expires_at_us=row.expires_at_us,
        last_used_at_us=row.last_used_at_us,
        revoked_at_us=row.revoked_at_us,
    )
