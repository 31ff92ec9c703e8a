"""What people would use instead, written for this comparison, on the same stores and with the same weights.

The older project's shape: one request = hash, SQL, put, embed one, query, insert one row, SQL; a search asks SQL for each hit.
The tutorial loop: embed one after another, then one insert. Both run torch in fp32 in this process and pay for no HTTP. The
network is ResNet50's shape with random weights: how well it finds is not measured here, how fast is.

python -m tests.benchmarks --only instead: this alone, on stacks of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from pymilvus import DataType, MilvusClient  # type: ignore[import-untyped]  # it has no types
from sqlalchemy import Connection, create_engine, make_url, text

from infra import object_store
from infra.object_store import ObjectStore
from infra.settings import ENV_PREFIX, ProcessorSettings, load
from processors.embedding.choice import chosen
from processors.embedding.embedder import Embedder
from processors.embedding.torch_backend import TorchEmbedder
from processors.raster import DecodeRules
from schemas.identity import ObjectRef
from schemas.vectors import Vector
from tests.benchmarks.bare import pixels_of
from tests.benchmarks.measures import LONGEST_WAIT_SECONDS, PUT_CONCURRENCY, Bench
from tests.benchmarks.parts import Run
from tests.benchmarks.random_weights import resnet50_variables
from tests.benchmarks.report import Result, percentile, ratio
from tests.pictures import edited_copy, jpeg
from tests.stack import FullStack

OURS, THEIRS = 240, 60
"""Pictures of a round. Ours get more of them: a batch has to be full before it is one."""
ROUNDS, SEARCHES, LIMIT = 3, 30, 100
INGEST_GOALS = {"fp32": 2.0, "int8": 6.0}
SEARCH_GOAL = 2.0
SHAPE = "ResNet50's shape, random weights"


@dataclass(frozen=True, slots=True)
class Instead:
    """The other arms, in a bucket, a table and a collection of their own that our services know nothing of."""

    bucket: str
    store: ObjectStore
    sql: Connection
    milvus: MilvusClient
    embedder: Embedder
    rules: DecodeRules

    async def embed(self, picture: bytes) -> Vector:
        vector: Vector = (await self.embedder.embed(pixels_of([picture], self.rules)))[0]
        return vector

    async def request(self, picture: bytes) -> None:
        """One upload of the older project."""
        digest = hashlib.md5(picture, usedforsecurity=False).hexdigest()
        if self._row(digest) is not None:
            return
        await self.store.put(ObjectRef(self.bucket, f"{digest}.jpg"), picture, "image/jpeg")
        vector = await self.embed(picture)
        if not self.milvus.query(self.bucket, filter=f'digest == "{digest}"', output_fields=["digest"]):
            self.milvus.insert(self.bucket, [{"digest": digest, "vector": vector}])
        self.sql.execute(text(f"INSERT INTO {self.bucket} VALUES (:digest, :name)"), {"digest": digest, "name": "some.jpg"})
        self.sql.commit()

    async def search(self, picture: bytes) -> int:
        """Hits with their rows, each asked for by itself."""
        vector = await self.embed(picture)
        found = self.milvus.search(
            self.bucket,
            [vector],
            limit=LIMIT,
            output_fields=["digest"],
            search_params={"metric_type": "COSINE", "params": {"ef": 2 * LIMIT}},
        )
        rows = [self._row(hit["digest"]) for hit in found[0]]
        self.sql.commit()
        return len([row for row in rows if row is not None])

    async def tutorial(self, pictures: list[bytes]) -> None:
        vectors = [await self.embed(picture) for picture in pictures]
        self.milvus.insert(f"{self.bucket}_loop", [{"digest": secrets.token_hex(16), "vector": vector} for vector in vectors])

    def _row(self, digest: str) -> object | None:
        return self.sql.execute(text(f"SELECT name FROM {self.bucket} WHERE digest = :digest"), {"digest": digest}).first()


@asynccontextmanager
async def instead(settings: ProcessorSettings) -> AsyncIterator[Instead]:
    name = f"instead{secrets.token_hex(4)}"
    description = chosen(settings)
    embedder = await TorchEmbedder(description, "fp32", Path(settings.own_weights)).start()
    store = await object_store.connect(settings)
    milvus = MilvusClient(settings.milvus_uri, token=settings.milvus_token.get_secret_value())
    driver = {"mysql": "mysql+pymysql", "sqlite": "sqlite"}
    url = make_url(settings.database_url.get_secret_value())
    engine = create_engine(url.set(drivername=driver[url.get_backend_name()]))
    try:
        await store.ensure_bucket(name)
        schema = MilvusClient.create_schema(auto_id=True)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=description.dimension)
        schema.add_field("digest", DataType.VARCHAR, max_length=64)
        index = milvus.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200})
        for collection in (name, f"{name}_loop"):
            milvus.create_collection(collection, schema=schema, index_params=index, consistency_level="Bounded")
        with engine.connect() as sql:
            sql.execute(text(f"CREATE TABLE {name} (digest VARCHAR(64) PRIMARY KEY, name VARCHAR(255))"))
            sql.commit()
            yield Instead(name, store, sql, milvus, embedder, description.decode_rules(settings))
            sql.execute(text(f"DROP TABLE {name}"))
    finally:
        engine.dispose()
        for collection in (name, f"{name}_loop"):
            milvus.drop_collection(collection)
        milvus.close()
        await store.close()
        await embedder.close()


async def measure(
    stack: FullStack, say: Callable[[str], None], *, precision: str = "fp32", rounds: int = ROUNDS
) -> list[Result]:
    """`stack` runs with the variables of `resnet50_variables`, in this precision. Ours and theirs in turn, never at once."""
    # What the stack was told by its environment is in no file of it.
    own = {name: stack.environment[f"{ENV_PREFIX}{name.upper()}"] for name in ("model", "own_weights", "weights_sha256")}
    settings = load(ProcessorSettings, state_dir=stack.state_dir, **own)
    numbers = iter(range(1_000_000, 2_000_000))
    ours: list[float] = []
    seed: list[float] = []
    tutorial: list[float] = []

    def pictures(count: int) -> list[bytes]:
        return [jpeg(next(numbers)) for _ in range(count)]

    async with (
        instead(settings) as other,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
    ):
        bench = Bench(stack, settings, session)
        for number in range(-1, rounds):  # the one before the first warms all of them
            few = number < 0
            rate = await _ours(bench, other.store, pictures(32 if few else OURS))
            batch = pictures(4 if few else THEIRS)
            by_request = await _rate(len(batch), [other.request(picture) for picture in batch])
            batch = pictures(len(batch))
            by_loop = await _rate(len(batch), [other.tutorial(batch)])
            if not few:
                ours.append(rate)
                seed.append(by_request)
                tutorial.append(by_loop)
                say(f"pictures a second, {precision}: ours {rate:.1f}, requests {by_request:.1f}, loop {by_loop:.1f}")
        goal = INGEST_GOALS.get(precision, 2.0)
        results = [
            ratio(f"ingest over the older project's shape, {SHAPE}, {precision}", goal, {"ours": ours, "requests": seed}),
            ratio(f"ingest over the tutorial loop, {SHAPE}, {precision}", goal, {"ours": ours, "loop": tutorial}),
        ]
        return [*results, await _searches(bench, other, precision, say)]


async def _rate(pictures: int, work: list[Coroutine[object, object, None]]) -> float:
    started = time.perf_counter()
    for one in work:
        await one
    return pictures / (time.perf_counter() - started)


async def _ours(bench: Bench, store: ObjectStore, pictures: list[bytes]) -> float:
    """From the first put until all rows say indexed."""
    before, batch = await bench.indexed(), secrets.token_hex(4)
    places = asyncio.Semaphore(PUT_CONCURRENCY)

    async def put(number: int) -> None:
        async with places:
            await store.put(ObjectRef(bench.bucket, f"instead/{batch}/{number}.jpg"), pictures[number], "image/jpeg")

    started = time.perf_counter()
    await asyncio.gather(*(put(number) for number in range(len(pictures))))
    async with asyncio.timeout(LONGEST_WAIT_SECONDS):
        while await bench.indexed() < before + len(pictures):
            await asyncio.sleep(0.05)
    return len(pictures) / (time.perf_counter() - started)


async def _searches(bench: Bench, other: Instead, precision: str, say: Callable[[str], None]) -> Result:
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(-3, SEARCHES):
        query = edited_copy(jpeg(3_000_000 + number))
        started = time.perf_counter()
        hits = len(await bench.search(query, LIMIT))
        between = time.perf_counter()
        theirs_found = await other.search(query)
        if number >= 0:
            ours.append(between - started)
            theirs.append(time.perf_counter() - between)
        assert hits == LIMIT and theirs_found >= LIMIT // 2, (hits, theirs_found)
    own, its = percentile(ours, 0.5), percentile(theirs, 0.5)
    say(f"search at limit {LIMIT}, {precision}: ours {1000 * own:.1f} ms, a query for each hit {1000 * its:.1f} ms")
    name = f"search at limit {LIMIT} over a query for each hit, {SHAPE}, {precision}"
    arms = {"a query for each hit, ms": [1000 * value for value in theirs], "ours, ms": [1000 * value for value in ours]}
    return Result(name, its / own, SEARCH_GOAL, "×", at_least=True, arms=arms)


def part(run: Run) -> list[Result]:
    results = []
    for precision in INGEST_GOALS:
        with tempfile.TemporaryDirectory(prefix="image-search-bench-") as folder:
            variables = {
                **resnet50_variables(Path(folder)),
                "IMAGE_SEARCH_MODEL_PRECISION": precision,
                "IMAGE_SEARCH_MODEL_BACKEND": "openvino",
            }
            with run.stack("full", **variables) as stack:
                results += asyncio.run(measure(stack, run.say, precision=precision, rounds=run.of(ROUNDS, 1)))
    return results
