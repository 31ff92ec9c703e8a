"""Steps 5 to 7: from what was read to what was found out, with a vector of every model that is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from infra.errors import ImageRejected, TransientError
from infra.metadata_store.interface import MetadataStore
from infra.object_store.interface import StoredObject
from infra.retry import until_done
from processors.reading import Read
from processors.steps import timed
from processors.vectors import Content, Embedded, Holders, Vectorizer, count_vectors, hash_contents
from processors.work import Failure, Finding, Picture, Work
from schemas.events import Cause
from schemas.identity import ContentHash, ModelFingerprint, ObjectId
from schemas.vectors import Vector

log = structlog.get_logger(__name__)

Results = Mapping[ContentHash, Embedded | ImageRejected]


class Finder:
    """`done` hears the number of each step that is over."""

    def __init__(
        self,
        metadata: MetadataStore,
        *,
        on_wait: Callable[[TransientError, int], None],
        done: Callable[[int], Awaitable[None]],
    ) -> None:
        self._metadata, self._on_wait, self._done = metadata, on_wait, done

    async def find(self, works: Sequence[Work], reads: Sequence[Read], models: Sequence[Vectorizer]) -> list[Finding]:
        """A finding for each of `works`. The active model comes first, and decides whether a picture is one."""
        present = [(work, read) for work, read in zip(works, reads, strict=True) if isinstance(read, StoredObject)]
        with timed(5, "hash"):
            to_hash = [(read.data, work.change.cause is Cause.REPAIR) for work, read in present]
            contents = await asyncio.to_thread(hash_contents, to_hash)
            holders = await self._holders(contents) if contents else {}
        await self._done(5)
        candidates = _candidates(holders, [(work, one) for (work, _), one in zip(present, contents, strict=True)])
        distinct = {one.content_hash: one for one in contents}
        fresh = {content.content_hash for content in contents if content.fresh}
        reusable = {content: ids for content, ids in candidates.items() if content not in fresh}
        of_models: list[Results] = []
        wanted = dict(distinct)
        for model in models:
            of_models.append(await _vectors_of(model, wanted, reusable))
            wanted = {key: one for key, one in wanted.items() if isinstance(of_models[0][key], Embedded)}
        await self._done(6)
        await self._done(7)
        of_object = _pictures(present, contents, models, of_models, holders)
        return [
            of_object[work.object_id] if isinstance(read, StoredObject) else read
            for work, read in zip(works, reads, strict=True)
        ]

    async def _holders(self, contents: Sequence[Content]) -> Holders:
        hashes = {content.content_hash for content in contents}
        return await until_done(lambda: self._metadata.indexed_with_content(hashes), on_wait=self._on_wait)


async def _vectors_of(model: Vectorizer, wanted: Mapping[ContentHash, Content], reusable: Holders) -> Results:
    reused = await model.reuse({content: ids for content, ids in reusable.items() if content in wanted})
    to_embed = [one for content, one in wanted.items() if content not in reused]
    embedded = await model.embed(to_embed) if to_embed else {}
    count_vectors(embedded=len(to_embed), reused=len(reused))
    return {**reused, **embedded}


def _candidates(holders: Holders, contents: Sequence[tuple[Work, Content]]) -> Holders:
    """Whose vectors may be of these contents: those whose rows say so, and of what a scan found, the object's own.

    After a database was lost the rows know nothing, and the vectors are all still there.
    """
    found = {content_hash: list(ids) for content_hash, ids in holders.items()}
    for work, content in contents:
        if work.change.cause is Cause.SCAN:
            found.setdefault(content.content_hash, []).append(work.object_id)
    return found


def _pictures(
    present: Sequence[tuple[Work, StoredObject]],
    contents: Sequence[Content],
    models: Sequence[Vectorizer],
    of_models: Sequence[Results],
    holders: Holders,
) -> dict[ObjectId, Finding]:
    found: dict[ObjectId, Finding] = {}
    first_with: dict[ContentHash, ObjectId] = {}
    for (work, read), content in zip(present, contents, strict=True):
        result = of_models[0][content.content_hash]
        if isinstance(result, ImageRejected):
            found[work.object_id] = Failure(result.reason, str(result), read.stat, content.content_hash)
            continue
        first = first_with.setdefault(content.content_hash, work.object_id)
        originals = [*holders.get(content.content_hash, ()), first]
        found[work.object_id] = Picture(
            stat=read.stat,
            content_hash=content.content_hash,
            md5=content.md5,
            facts=result.facts,
            vectors=_vectors(content.content_hash, models, of_models),
            model=models[0].model.name,
            duplicate_of=next((original for original in originals if original != work.object_id), None),
            timings_ms=dict(result.timings_ms),
        )
    return found


def _vectors(
    content: ContentHash, models: Sequence[Vectorizer], of_models: Sequence[Results]
) -> dict[ModelFingerprint, Vector]:
    """A model beside the active one that could not take a picture goes without: the next scan sees that, and tries again."""
    vectors: dict[ModelFingerprint, Vector] = {}
    for one, results in zip(models, of_models, strict=True):
        result = results[content]
        if isinstance(result, Embedded):
            vectors[one.model.fingerprint] = result.vector
        else:
            log.warning("a model did not take a picture", model=one.model.name, reason=str(result))
    return vectors
