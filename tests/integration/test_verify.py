"""verify on the real stores: each disagreement made by hand, at once, and found."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest

from infra import metadata_store, object_store, vector_store
from infra.metadata_store import MetadataStore, upgrade_schema
from infra.metadata_store.interface import ImageRow, ModelRow, RowWrite
from infra.object_store import ObjectStore
from infra.settings import CommonSettings
from infra.vector_store import VectorStore
from infra.verify import FindingKind, verify
from schemas.identity import ContentHash, ModelFingerprint, ObjectRef, content_hash_of
from schemas.tables import ModelState, RowState
from schemas.vectors import VectorRow, collection_name
from tests.conftest import FreshSettings

FINGERPRINT = ModelFingerprint("e" * 64)
DIMENSION = 8


@dataclass
class World:
    settings: CommonSettings
    objects: ObjectStore
    metadata: MetadataStore
    vectors: VectorStore

    @property
    def bucket(self) -> str:
        return self.settings.buckets[0]

    @property
    def collection(self) -> str:
        return collection_name(FINGERPRINT, self.settings.milvus_collection_prefix)

    async def add_picture(self, key: str) -> ObjectRef:
        ref, data = ObjectRef(self.bucket, key), key.encode()
        stat = await self.objects.put(ref, data)
        row = ImageRow(ref, RowState.INDEXED, 1, published_generation=0, etag=stat.etag, content_hash=content_hash_of(data))
        await self.metadata.write([RowWrite(row, 0, frozenset({FINGERPRINT}))])
        await self.metadata.mark_published({ref.object_id: 1})
        await self.add_vector(ref, content_hash_of(data))
        return ref

    async def add_vector(self, ref: ObjectRef, content_hash: ContentHash) -> None:
        vector = np.eye(1, DIMENSION, dtype=np.float32)[0]
        row = VectorRow(ref.object_id, vector, ref, content_hash, 1, 1, 1, 1, "jpeg")
        await self.vectors.upsert(self.collection, [row])

    async def found(self) -> dict[str, set[str]]:
        report = await verify(self.settings)
        return {kind.value: {item.key for item in those.listed} for kind, those in report.findings.items() if those.total}


@pytest.fixture
async def world(fresh_settings: FreshSettings) -> AsyncIterator[World]:
    settings = fresh_settings(CommonSettings)
    await upgrade_schema(settings)
    async with AsyncExitStack() as stores:
        objects = await object_store.connect(settings)
        stores.push_async_callback(objects.close)
        metadata = await metadata_store.connect(settings)
        stores.push_async_callback(metadata.close)
        vectors = await vector_store.connect(settings)
        stores.push_async_callback(vectors.close)
        world = World(settings, objects, metadata, vectors)
        await objects.ensure_bucket(world.bucket)
        await vectors.create_collection(world.collection, dimension=DIMENSION)
        stores.push_async_callback(vectors.drop_collection, world.collection)
        model = ModelRow(FINGERPRINT, "m", world.collection, DIMENSION, "openvino", "fp32", {}, ModelState.ACTIVE, 0)
        await metadata.add_model(model)
        yield world


async def test_what_does_not_fit_is_found_and_what_fits_is_not(world: World) -> None:
    for key in ("good.jpg", "folder-a.jpg", "folder/ä 日本.jpg"):
        await world.add_picture(key)
    assert await world.found() == {}

    await world.objects.put(ObjectRef(world.bucket, "unknown.jpg"), b"unknown")
    unvectored = await world.add_picture("no-vector.jpg")
    await world.vectors.delete(world.collection, [unvectored.object_id])
    await world.objects.delete(await world.add_picture("object-gone.jpg"))
    await world.add_vector(ObjectRef(world.bucket, "only-a-vector.jpg"), content_hash_of(b"?"))
    await world.objects.put(await world.add_picture("overwritten.jpg"), b"overwritten")
    await world.add_vector(await world.add_picture("wrong-vector.jpg"), content_hash_of(b"?"))
    owing = await world.add_picture("owing.jpg")
    row = (await world.metadata.rows([owing.object_id]))[owing.object_id]
    await world.metadata.write([RowWrite(replace(row, generation=2), 1, frozenset({FINGERPRINT}))])

    assert await world.found() == {
        FindingKind.MISSING: {"unknown.jpg", "no-vector.jpg"},
        FindingKind.GHOST: {"object-gone.jpg", "only-a-vector.jpg"},
        FindingKind.STALE: {"overwritten.jpg"},
        FindingKind.WRONG_VECTOR: {"wrong-vector.jpg"},
        FindingKind.UNPUBLISHED: {"owing.jpg"},
    }
