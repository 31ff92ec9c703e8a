"""A bucket, an index that agrees with it or not, and scans between them, on the twins of the stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from infra.errors import ObjectGone
from infra.kafka.interface import Producer
from infra.kafka.memory import MemoryBroker
from infra.metadata_store.interface import ImageRow, ModelRow, RowWrite
from infra.metadata_store.memory import MemoryMetadataStore
from infra.object_store.interface import ObjectStat
from infra.object_store.memory import MemoryObjectStore
from infra.vector_store.memory import MemoryVectorStore
from ingest_bridge.backlog import Backlog
from ingest_bridge.scan import Scan
from ingest_bridge.scan_events import ScanEvents
from ingest_bridge.scan_state import RemovalGuard, ScanProgress
from schemas.events import ObjectEvent, ReasonCode
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef, content_hash_of
from schemas.jobs import ScanArguments
from schemas.tables import ModelState, RowState
from schemas.topics import ALL_TOPICS, OBJECTS, PROCESSOR_GROUP
from schemas.vectors import VectorRow

BUCKET = "images"
COLLECTION = "c"
MODEL = ModelFingerprint("f" * 64)
SECOND_US = 1_000_000
START_US = 1_800_000_000 * SECOND_US
OLD_US = START_US - 3600 * SECOND_US


def ref(key: str) -> ObjectRef:
    return ObjectRef(BUCKET, key)


class ScanWorld:
    """`sleep` is where the workers get to work: each time they commit all that was written."""

    def __init__(self, *, page_size: int = 3) -> None:
        self.now_us = START_US
        self.objects = MemoryObjectStore(BUCKET, now_us=lambda: self.now_us, page_size=page_size)
        self.metadata = MemoryMetadataStore(now_us=lambda: self.now_us)
        self.vectors = MemoryVectorStore()
        self.broker = MemoryBroker(*ALL_TOPICS)
        self.slept = 0

    async def put(self, key: str, data: bytes = b"picture") -> ObjectStat:
        return await self.objects.put(ref(key), data)

    async def delete(self, key: str) -> None:
        await self.objects.delete(ref(key))

    async def add_model(self, fingerprint: ModelFingerprint = MODEL, state: ModelState = ModelState.ACTIVE) -> None:
        await self.vectors.create_collection(COLLECTION, dimension=1)
        await self.metadata.add_model(ModelRow(fingerprint, "m", COLLECTION, 1, "openvino", "fp32", {}, state, 0))

    async def index(self, key: str, data: bytes = b"picture") -> None:
        """A put, and its row as a worker leaves it."""
        await self.settle(await self.put(key, data), data)

    async def settle(self, stat: ObjectStat, data: bytes = b"picture", **changes: Any) -> None:
        row = ImageRow(
            stat.ref,
            RowState.INDEXED,
            1,
            1,
            content_hash=content_hash_of(data),
            etag=stat.etag,
            put_time_us=stat.put_time_us,
            size=stat.size,
            updated_at_us=self.now_us,
        )
        await self.write_row(replace(row, **changes))

    async def write_row(self, row: ImageRow, models: frozenset[ModelFingerprint] = frozenset({MODEL})) -> None:
        standing = (await self.metadata.rows([row.object_id])).get(row.object_id)
        seen = standing.generation if standing else 0
        published = seen + 1 if row.is_published else seen
        kept = models if row.content_hash is not None else frozenset()
        row = replace(row, generation=seen + 1, published_generation=published)
        assert not await self.metadata.write([RowWrite(row, seen, kept)])
        if await self.vectors.has_collection(COLLECTION):
            await self._write_vector(row, MODEL in kept)

    async def _write_vector(self, row: ImageRow, is_held: bool) -> None:
        if is_held and row.state is RowState.INDEXED and row.content_hash is not None:
            await self.hold(row.ref.key, row.content_hash)
        else:
            await self.vectors.delete(COLLECTION, [row.object_id])

    async def hold(self, key: str, content_hash: ContentHash) -> None:
        """A vector under this key, whatever the other stores say."""
        vector = np.ones(1, dtype=np.float32)
        await self.vectors.upsert(
            COLLECTION, [VectorRow(ref(key).object_id, vector, ref(key), content_hash, 0, 1, 20, 20, "JPEG")]
        )

    async def scan(
        self,
        *,
        prefix: str = "",
        allow_removal: bool = False,
        progress: ScanProgress | None = None,
        guard: RemovalGuard = RemovalGuard(100, 0.2),  # noqa: B008 - frozen
        scan_id: str = "scan-1",
        floor_events: int = 64,
    ) -> Scan:
        return self.scan_with(
            scan_id,
            ScanArguments(bucket=BUCKET, prefix=prefix, allow_removal=allow_removal),
            progress or ScanProgress(),
            await self.broker.producer(),
            guard=guard,
            floor_events=floor_events,
        )

    def scan_with(
        self,
        scan_id: str,
        arguments: ScanArguments,
        progress: ScanProgress,
        producer: Producer,
        *,
        guard: RemovalGuard = RemovalGuard(100, 0.2),  # noqa: B008 - frozen
        floor_events: int = 64,
        give_up_seconds: float = 0.2,
    ) -> Scan:
        events = ScanEvents(
            scan_id,
            progress,
            deployment="local",
            objects=self.objects,
            producer=producer,
            backlog=Backlog(
                self.broker, floor_events=floor_events, seconds=1.0, commit_interval_seconds=1.0, now=lambda: self.slept
            ),
            now_us=lambda: self.now_us,
            sleep=self.sleep,
            give_up_seconds=give_up_seconds,
        )
        return Scan(
            arguments,
            progress,
            events=events,
            guard=guard,
            objects=self.objects,
            metadata=self.metadata,
            vectors=self.vectors,
        )

    async def run_scan(self, *, prefix: str = "", allow_removal: bool = False, scan_id: str = "scan-1") -> ScanProgress:
        scan = await self.scan(prefix=prefix, allow_removal=allow_removal, scan_id=scan_id)
        await scan.run()
        return scan.progress

    async def sleep(self, seconds: float) -> None:
        self.slept += 1
        await self.commit_all()

    async def commit_all(self) -> None:
        offsets = {number: end for number, (_, end) in (await self.broker.offsets(OBJECTS)).items()}
        self.broker.commit(OBJECTS, PROCESSOR_GROUP, offsets)

    async def pending(self) -> int:
        return sum(partition.pending for partition in await self.broker.lag(OBJECTS, PROCESSOR_GROUP))

    def events(self) -> list[ObjectEvent]:
        return [ObjectEvent.model_validate_json(record.value) for record in self.broker.records(OBJECTS)]

    def in_short(self) -> list[str]:
        """`cause key`, a removal with a minus; sorted."""
        return sorted(f"{event.data.cause} {'-' if event.data.removed else ''}{event.data.key}" for event in self.events())

    async def work(self, events: Sequence[ObjectEvent]) -> None:
        """What workers make of events: the bucket's present state decides, as in the real pipeline."""
        for event in events:
            standing = (await self.metadata.rows([event.data.ref.object_id])).get(event.data.ref.object_id)
            try:
                stored = await self.objects.read(event.data.ref, max_bytes=1 << 20)
            except ObjectGone:
                if standing is not None and standing.state is not RowState.DELETED:
                    await self.write_row(
                        replace(standing, state=RowState.DELETED, content_hash=None, published_generation=standing.generation)
                    )
                continue
            await self.settle(stored.stat, stored.data)

    async def row(self, key: str) -> ImageRow | None:
        return (await self.metadata.rows([ref(key).object_id])).get(ref(key).object_id)

    async def index_equals_bucket(self) -> bool:
        """Each object has an indexed row that names it and is published, and no other row lives."""
        rows = await self.metadata.list_rows(bucket=BUCKET, limit=10_000)
        live = {row.ref: (row.etag, row.put_time_us) for row in rows if row.state is not RowState.DELETED}
        stats = {stat.ref: (stat.etag, stat.put_time_us) async for page in self.objects.list_pages(BUCKET) for stat in page}
        held = await self.metadata.models_of([row.object_id for row in rows])
        whole = all(
            row.is_published and held.get(row.object_id) == {MODEL: row.content_hash}
            for row in rows
            if row.state is RowState.INDEXED
        )
        return live == stats and whole and all(row.state in (RowState.INDEXED, RowState.DELETED) for row in rows)


def failed(reason: ReasonCode, attempt: int) -> dict[str, Any]:
    """Changes that make an indexed row a failed one."""
    return {"state": RowState.FAILED, "reason": reason, "attempt": attempt, "content_hash": None}
