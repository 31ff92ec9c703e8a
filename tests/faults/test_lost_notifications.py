"""Promise: notifications that a store loses cost nothing but time: the next scan finds what they left out (invariant 1).

A MinIO of its own, whose notifications alone are relayed: until the scan is asked for, what they miss stays missing, so the
tests can count it. Some objects came before the fault; a tenth of them is overwritten and a tenth deleted during it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from infra.errors import StoreUnavailable
from infra.local_stack import minio as local_minio
from infra.settings import ProcessorSettings
from schemas.identity import ObjectRef
from schemas.tables import RowState
from tests.bridge import relaying, scan
from tests.conftest import FreshSettings, Servers
from tests.deployment import Deployment, deployed, until
from tests.own_minio import OwnMinio, own_minio
from tests.pictures import jpeg

OBJECTS_WITHOUT_BROKER = 6
"""Of each bucket. Against a broker that is away MinIO answers a PUT only after half a second, one after the other."""
OBJECTS_A_KILL = 60
CLIENTS = 16
KILLS = 3
HEARD_SECONDS = 5.0


async def test_broker_away_while_pictures_come(fresh_settings: FreshSettings, servers: Servers, tmp_path: Path) -> None:
    """Of two targets the stored one keeps all; a bucket that has the direct one alone loses what came meanwhile."""
    async with own_minio(servers, tmp_path / "minio") as minio:
        settings = fresh_settings(ProcessorSettings, **minio.values, buckets="two-targets,one-target", decode_workers=1)
        async with deployed(settings, tmp_path) as deployment, relaying(settings):
            deployment.worker()
            rules = await deployment.objects.notification_rules("one-target")
            direct = [rule for rule in rules if rule.target == local_minio.ARNS[0]]
            assert direct != rules
            await deployment.objects.set_notification_rules("one-target", direct)
            for bucket in settings.buckets:
                await at_once(put(deployment, bucket, number, number) for number in range(0, OBJECTS_WITHOUT_BROKER, 5))
                await until_like_the_bucket(deployment, bucket)

            async with servers.stack.paused("kafka"):
                await at_once(
                    remove(deployment, bucket, number) if number % 10 == 5 else put(deployment, bucket, number, 1000 + number)
                    for bucket in settings.buckets
                    for number in range(OBJECTS_WITHOUT_BROKER)
                )
                with pytest.raises(StoreUnavailable):
                    await deployment.broker.check()
                assert minio.stored_events() >= OBJECTS_WITHOUT_BROKER
            await servers.stack.wait_ready("kafka")

            await until_like_the_bucket(deployment, "two-targets")
            await until_heard(deployment, "one-target")
            assert await unlike_the_bucket(deployment, "one-target") == {
                key(number) for number in range(OBJECTS_WITHOUT_BROKER)
            }
            await scan(deployment)
            assert not await unlike_the_bucket(deployment, "one-target")
            await deployment.verified()


async def test_minio_killed_right_after_its_answers(fresh_settings: FreshSettings, servers: Servers, tmp_path: Path) -> None:
    """Whether or not a kill costs events, and however many, a scan makes the index equal to the bucket."""
    async with own_minio(servers, tmp_path / "minio") as minio:
        settings = fresh_settings(ProcessorSettings, **minio.values, buckets="killed", decode_workers=1)
        async with deployed(settings, tmp_path) as deployment, relaying(settings):
            deployment.worker()
            acknowledged: set[str] = set()
            unlike: list[int] = []
            for turn in range(KILLS):
                numbers = range(turn * OBJECTS_A_KILL, (turn + 1) * OBJECTS_A_KILL)
                acknowledged |= await put_until_killed(deployment, minio, numbers)
                await minio.wait_ready()
                await until_heard(deployment, "killed")
                await deployment.settle()
                unlike.append(len(await unlike_the_bucket(deployment, "killed")))
            print(f"objects that no event put right, after each kill: {unlike}")
            assert minio.stack.running("minio").restarts >= KILLS
            await scan(deployment)
            rows = await deployment.rows()
            assert {rows[name].state for name in acknowledged} <= {RowState.INDEXED, RowState.DELETED}
            assert len(acknowledged) >= KILLS * OBJECTS_A_KILL // 3
            assert not await unlike_the_bucket(deployment, "killed")
            await deployment.verified()


async def put_until_killed(deployment: Deployment, minio: OwnMinio, numbers: range) -> set[str]:
    """Put, and delete a tenth of the last turn's; MinIO is killed at the answer to the one in the middle. Returns the keys
    that were acknowledged. What became of the others is unknown, as it is to any client whose store dies."""
    acknowledged: set[str] = set()
    killed = False

    async def client(number: int) -> None:
        nonlocal killed
        try:
            if number % 10 == 5:
                await remove(deployment, "killed", number - OBJECTS_A_KILL - 1)
            else:
                await put(deployment, "killed", number, number)
                acknowledged.add(key(number))
        except StoreUnavailable:
            return
        if not killed and number >= numbers[len(numbers) // 2]:
            killed = True
            minio.kill()

    await at_once(client(number) for number in numbers)
    assert killed
    return acknowledged


def key(number: int) -> str:
    return f"{number:04}.jpg"


async def put(deployment: Deployment, bucket: str, number: int, seed: int) -> None:
    await deployment.objects.put(ObjectRef(bucket, key(number)), jpeg(seed, (120, 90)), "image/jpeg")


async def remove(deployment: Deployment, bucket: str, number: int) -> None:
    await deployment.objects.delete(ObjectRef(bucket, key(number)))


async def at_once(calls: Iterable[Awaitable[None]]) -> None:
    places = asyncio.Semaphore(CLIENTS)

    async def one(call: Awaitable[None]) -> None:
        async with places:
            await call

    await asyncio.gather(*map(one, calls))


async def unlike_the_bucket(deployment: Deployment, bucket: str) -> set[str]:
    """Keys that are missing in the index, left over, or of other bytes."""
    rows = await deployment.metadata.list_rows(bucket=bucket)
    indexed = {(row.ref.key, row.etag) for row in rows if row.state is RowState.INDEXED}
    present = {(stat.ref.key, stat.etag) async for page in deployment.objects.list_pages(bucket) for stat in page}
    return {name for name, _ in indexed ^ present}


async def until_like_the_bucket(deployment: Deployment, bucket: str) -> None:
    async def is_like_it() -> bool:
        return not await unlike_the_bucket(deployment, bucket)

    await until(is_like_it)


async def until_heard(deployment: Deployment, bucket: str) -> None:
    """Put until the event of one has come all the way: those before it on the same way have, too.

    One would not do: for some moments after its start MinIO takes objects without announcing any.
    """

    async def is_heard() -> bool:
        ref = ObjectRef(bucket, f"heard-{secrets.token_hex(4)}.jpg")
        await deployment.objects.put(ref, jpeg(1, (120, 90)), "image/jpeg")
        with suppress(TimeoutError):
            await until(lambda: _has_a_row(deployment, ref), HEARD_SECONDS)
            return True
        return False

    await until(is_heard)


async def _has_a_row(deployment: Deployment, ref: ObjectRef) -> bool:
    return bool(await deployment.metadata.rows([ref.object_id]))
