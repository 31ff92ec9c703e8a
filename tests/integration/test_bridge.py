"""The bridge on real servers: what a client that knows nothing of us does to a bucket comes out as object events."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from infra import kafka, metadata_store
from infra.kafka.interface import Broker, Message, Producer
from infra.metadata_store.interface import MetadataStore
from infra.settings import BridgeSettings, ProcessorSettings
from ingest_bridge import commands, service
from ingest_bridge.notifications.seaweedfs import BUCKETS_DIR
from ingest_bridge.provision import upgrade_step
from ingest_bridge.scan_jobs import SCAN_JOB
from schemas.events import Cause, ObjectEvent
from schemas.tables import JobState, log_cursor_name
from schemas.topics import OBJECTS, Topic
from tests.conftest import FreshSettings, Servers
from tests.s3_client import Bucket

PATIENCE_SECONDS = 40.0
LONG_KEY = "/".join(["k" * 200] * 5) + "/" + "j" * 19
ODD_KEYS = (
    "a b.jpg",
    "a+b.jpg",
    "a%20b.jpg",
    "dir/ä é.jpg",
    "日本/写真.png",
    "ends in a space ",
    "Case.jpg",
    "case.jpg",
    "q?x#y&z=1.jpg",
    "line\u2028separator",
    LONG_KEY,
)


class Deployment:
    """A bucket, topics and a database of its own, and what was written to the objects topic so far."""

    def __init__(self, settings: BridgeSettings, broker: Broker, metadata: MetadataStore) -> None:
        self.settings = settings
        self.broker = broker
        self.metadata = metadata
        self.bucket = Bucket(settings)
        self.events: list[ObjectEvent] = []
        self._offsets: dict[int, int] = {}

    async def read_new(self) -> None:
        ends = await self.broker.offsets(OBJECTS)
        left = {number: end for number, (_, end) in ends.items() if end > self._offsets.get(number, 0)}
        if not left:
            return
        async with self.broker.read(OBJECTS, {number: self._offsets.get(number, 0) for number in ends}) as pages:
            async for page in pages:
                for record in page:
                    event = ObjectEvent.model_validate_json(record.value)
                    assert record.key == event.data.ref.topic_key
                    self.events.append(event)
                    self._offsets[record.partition] = record.offset + 1
                if all(self._offsets.get(number, 0) >= end for number, end in left.items()):
                    return

    def said_of(self, key: str, *causes: Cause) -> str:
        """`+` for each change and `-` for each removal, in the order of the topic."""
        found = [event.data for event in self.events if event.data.key == key and (not causes or event.data.cause in causes)]
        return "".join("-" if change.removed else "+" for change in found)

    def keys(self, cause: Cause) -> set[str]:
        return {event.data.key for event in self.events if event.data.cause is cause}

    async def until(self, condition: Callable[[], bool | Awaitable[bool]]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                await self.read_new()
                met = condition()
                if met if isinstance(met, bool) else await met:
                    return
                await asyncio.sleep(0.05)

    async def settled(self) -> None:
        """Until no scan waits or runs."""

        async def none_left() -> bool:
            return not await self.metadata.unfinished_jobs(SCAN_JOB)

        await self.until(none_left)

    @asynccontextmanager
    async def bridge(self, *, scanned: bool = True) -> AsyncIterator[asyncio.Task[None]]:
        """The whole service, and stopped in order behind the block. `scanned`: from when its first scan is done."""
        running = asyncio.create_task(service.serve(self.settings))
        try:
            await self.until(lambda: self.follows(running))
            if scanned:
                await self.settled()
            yield running
        finally:
            running.cancel()
            await asyncio.wait([running])
            if not running.cancelled() and (error := running.exception()):
                raise error

    async def follows(self, running: asyncio.Task[None]) -> bool:
        if running.done():
            await running
        cursor = await self.metadata.cursor(log_cursor_name(self.bucket.name))
        return cursor is not None and not cursor.clean and bool(self.children())

    def children(self) -> list[psutil.Process]:
        """The processes that follow the log of this bucket."""
        prefix = f"-pathPrefix={BUCKETS_DIR}{self.bucket.name}/"
        return [one for one in psutil.Process().children(recursive=True) if prefix in _command_line(one)]

    async def child(self) -> psutil.Process:
        """Waited for, because the system does not tell the command of a process while it is being started."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (found := self.children()):
                await asyncio.sleep(0.05)
        return found[0]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def deployment(fresh_settings: FreshSettings) -> AsyncIterator[Deployment]:
    # No worker takes anything here, so a scan must not wait for one.
    settings = fresh_settings(BridgeSettings, bridge_port=_free_port(), scan_backlog_events=1000)
    said: list[str] = []
    await metadata_store.upgrade_schema(settings)
    await upgrade_step(ProcessorSettings.model_validate(settings.model_dump()), said.append)
    assert len(said) == 2
    broker = await kafka.connect(settings)
    metadata = await metadata_store.connect(settings)
    yield Deployment(settings, broker, metadata)
    await broker.close()
    await metadata.close()


async def test_what_a_client_does_to_a_bucket_is_announced(deployment: Deployment) -> None:
    bucket = deployment.bucket
    async with deployment.bridge():
        await bucket.put("a.jpg", b"first")
        await bucket.put("a.jpg", b"second")
        await bucket.do("put_object_tagging", "a.jpg", Tagging={"TagSet": [{"Key": "k", "Value": "v"}]})
        await bucket.copy("a.jpg", "copy.jpg")
        await bucket.put_in_parts("parts.bin", b"x" * (5 << 20), b"y" * 1000)
        await bucket.put("zero.jpg", b"")
        await bucket.put("folder/marker/", b"")
        await bucket.put("gone.jpg")
        await bucket.do("delete_object", "gone.jpg")
        await bucket.do("delete_object", "never-there.jpg")
        await bucket.put("last.jpg")
        await deployment.until(lambda: deployment.said_of("last.jpg") == "+")
    said = {key: deployment.said_of(key, Cause.NOTIFICATION) for key in {event.data.key for event in deployment.events}}
    assert said == {
        "a.jpg": "+++",
        "copy.jpg": "+",
        "parts.bin": "+",
        "zero.jpg": "+",
        "folder/marker/": "+",
        "gone.jpg": "+-",
        "last.jpg": "+",
    }
    assert len({event.id for event in deployment.events}) == len(deployment.events)
    for key in ("a.jpg", "copy.jpg", "parts.bin", "zero.jpg"):
        last = [event.data for event in deployment.events if event.data.key == key][-1]
        assert last.put_time is not None
        assert (last.etag, last.put_time.timestamp()) == await bucket.head(key)


async def test_tags_leave_etag_and_put_time_alone(deployment: Deployment) -> None:
    """A worker drops what has both from its row, so tags cost no embedding."""
    async with deployment.bridge():
        await deployment.bucket.put("a.jpg")
        await asyncio.sleep(1.1)  # into another second, the resolution of the put time
        await deployment.bucket.do("put_object_tagging", "a.jpg", Tagging={"TagSet": [{"Key": "k", "Value": "v"}]})
        await deployment.until(lambda: deployment.said_of("a.jpg") == "++")
    put, tagged = (event.data for event in deployment.events)
    assert (put.etag, put.put_time, put.size) == (tagged.etag, tagged.put_time, tagged.size)


async def test_odd_keys_come_through_notifications_and_scans_alike(deployment: Deployment) -> None:
    async with deployment.bridge():
        for key in ODD_KEYS:
            await deployment.bucket.put(key)
        await deployment.until(lambda: deployment.keys(Cause.NOTIFICATION) == set(ODD_KEYS))
        await deployment.metadata.add_job(SCAN_JOB, {"bucket": deployment.bucket.name})
        await deployment.until(lambda: deployment.keys(Cause.SCAN) == set(ODD_KEYS))
    of = {cause: {e.data.key: e.data for e in deployment.events if e.data.cause is cause} for cause in Cause}
    for key in ODD_KEYS:
        noted, scanned = of[Cause.NOTIFICATION][key], of[Cause.SCAN][key]
        assert (noted.etag, noted.put_time, noted.size) == (scanned.etag, scanned.put_time, scanned.size)


async def test_what_was_there_before_is_taken_in(deployment: Deployment) -> None:
    keys = {f"old/{number}.jpg" for number in range(30)}
    await asyncio.gather(*(deployment.bucket.put(key) for key in keys))
    # The log of a first start begins a few seconds ago: what is older comes by the scan alone.
    await asyncio.sleep(deployment.settings.follow_overlap_seconds + 1)
    async with deployment.bridge():
        await deployment.until(lambda: deployment.keys(Cause.SCAN) == keys)
        assert deployment.keys(Cause.NOTIFICATION) == set()


async def test_a_clean_stop_misses_nothing(deployment: Deployment) -> None:
    async with deployment.bridge():
        await deployment.bucket.put("before.jpg")
        await deployment.until(lambda: deployment.said_of("before.jpg") == "+")
    cursor = await deployment.metadata.cursor(log_cursor_name(deployment.bucket.name))
    assert cursor is not None and cursor.clean
    assert deployment.children() == []
    await deployment.bucket.put("meanwhile.jpg")
    await deployment.bucket.do("delete_object", "before.jpg")
    await asyncio.sleep(deployment.settings.follow_overlap_seconds + 1)
    async with deployment.bridge(scanned=False):
        await deployment.until(lambda: deployment.said_of("meanwhile.jpg", Cause.NOTIFICATION) == "+")
        await deployment.until(lambda: deployment.said_of("before.jpg", Cause.NOTIFICATION).endswith("-"))


async def test_a_killed_child_loses_nothing_and_a_scan_looks(deployment: Deployment) -> None:
    before, behind = [f"before/{number}.jpg" for number in range(20)], [f"behind/{number}.jpg" for number in range(20)]
    async with deployment.bridge():
        [child] = deployment.children()
        await _put_all(deployment.bucket, before)
        os.kill(child.pid, signal.SIGKILL)
        await _put_all(deployment.bucket, behind)
        await deployment.until(lambda: deployment.keys(Cause.NOTIFICATION) == {*before, *behind})
        # None of these has a row yet, so the scan after the gap names every one.
        await deployment.until(lambda: deployment.keys(Cause.SCAN) == {*before, *behind})
        assert child.pid not in {one.pid for one in deployment.children()}


async def _put_all(bucket: Bucket, keys: list[str]) -> None:
    for key in keys:
        await bucket.put(key)


async def test_a_killed_server_loses_its_log_and_a_scan_heals(deployment: Deployment, servers: Servers) -> None:
    keys = {f"{number}.jpg" for number in range(40)}
    async with deployment.bridge():
        # Stopped, the child hears nothing of these, and the log that it would read later dies with the server.
        [child] = deployment.children()
        os.kill(child.pid, signal.SIGSTOP)
        await _put_all(deployment.bucket, sorted(keys))
        servers.stack.kill("seaweedfs")
        os.kill(child.pid, signal.SIGKILL)
        await servers.stack.wait_ready("seaweedfs")
        await deployment.until(lambda: deployment.keys(Cause.SCAN) >= keys)
        heard = deployment.keys(Cause.NOTIFICATION)
        assert len(heard) < len(keys), "the fault did not bite: the log still had everything"
        await deployment.bucket.put("afterwards.jpg")
        await deployment.until(lambda: deployment.said_of("afterwards.jpg", Cause.NOTIFICATION) == "+")


async def test_a_broker_that_was_away_is_caught_up(deployment: Deployment, servers: Servers) -> None:
    async with deployment.bridge():
        async with servers.stack.paused("kafka"):
            await deployment.bucket.put("meanwhile.jpg")
            await asyncio.sleep(1)
        await deployment.until(lambda: deployment.said_of("meanwhile.jpg", Cause.NOTIFICATION) != "")


async def test_an_idle_log_counts_as_handed_over(deployment: Deployment) -> None:
    async with deployment.bridge():
        name = log_cursor_name(deployment.bucket.name)
        first = await deployment.metadata.cursor(name)
        assert first is not None

        async def moved_on() -> bool:
            cursor = await deployment.metadata.cursor(name)
            return cursor is not None and cursor.position > first.position + 3_000_000_000

        await deployment.until(moved_on)


async def test_a_missing_bucket_fails_the_scan_and_removes_nothing(deployment: Deployment) -> None:
    settings = deployment.settings.model_copy(update={"buckets": (deployment.bucket.name, "no-such-bucket")})
    job = await deployment.metadata.add_job(SCAN_JOB, {"bucket": "no-such-bucket"})
    running = asyncio.create_task(service.serve(settings))

    async def ended() -> bool:
        found = await deployment.metadata.job(job.job_id)
        return found is not None and found.state is JobState.FAILED

    await deployment.until(ended)
    running.cancel()
    await asyncio.wait([running])
    found = await deployment.metadata.job(job.job_id)
    assert found is not None and found.message is not None and "Nothing was removed" in found.message
    assert deployment.events == []


async def test_a_part_that_dies_ends_the_service(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Producer, topic: Topic, messages: list[Message]) -> None:
        raise ZeroDivisionError("ours")

    producer = await deployment.broker.producer()
    monkeypatch.setattr(type(producer), "send", broken)
    await producer.close()
    running = asyncio.create_task(service.serve(deployment.settings))
    await deployment.until(lambda: deployment.follows(running))
    await deployment.bucket.put("a.jpg")
    await asyncio.wait([running], timeout=PATIENCE_SECONDS)
    assert isinstance(running.exception(), ZeroDivisionError)
    assert deployment.children() == []


# -- as a process ----------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def _bridge_process(deployment: Deployment) -> AsyncIterator[asyncio.subprocess.Process]:
    values = deployment.settings.model_dump(mode="json")
    secrets = {name: getattr(deployment.settings, name).get_secret_value() for name in ("s3_secret_key", "database_url")}
    names = ("s3_endpoint", "s3_access_key", "kafka_topic_prefix", "seaweedfs_filer", "seaweedfs_weed", "bridge_port")
    environment = {f"IMAGE_SEARCH_{name.upper()}": str(value) for name, value in secrets.items()}
    environment |= {f"IMAGE_SEARCH_{name.upper()}": str(values[name]) for name in names}
    environment |= {f"IMAGE_SEARCH_{name.upper()}": ",".join(values[name]) for name in ("buckets", "kafka_bootstrap")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "infra.cli", "--state-dir", "no-such-folder", "bridge"), env={**os.environ, **environment}
    )
    try:
        await deployment.until(lambda: bool(deployment.children()))
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_sigterm_stops_it_in_order(deployment: Deployment) -> None:
    async with _bridge_process(deployment) as process:
        child = await deployment.child()
        process.terminate()
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert not child.is_running()
    cursor = await deployment.metadata.cursor(log_cursor_name(deployment.bucket.name))
    assert cursor is not None
    assert cursor.clean


async def test_killed_it_leaves_no_child_and_loses_nothing(deployment: Deployment) -> None:
    async with _bridge_process(deployment) as process:
        await deployment.bucket.put("before.jpg")
        await deployment.until(lambda: deployment.said_of("before.jpg", Cause.NOTIFICATION) == "+")
        child = await deployment.child()
        process.kill()
        await process.wait()
        await deployment.until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    await deployment.bucket.put("meanwhile.jpg")
    async with deployment.bridge(scanned=False):
        await deployment.until(lambda: deployment.said_of("meanwhile.jpg", Cause.NOTIFICATION) != "")
        # Killed, it may have said it without noting so: once more is well, never is not.
        assert deployment.said_of("before.jpg", Cause.NOTIFICATION) in ("+", "++")


# -- the commands ----------------------------------------------------------------------------------------------------------
async def _invoke(deployment: Deployment, *arguments: str) -> Result:
    environment = {
        "IMAGE_SEARCH_BUCKETS": deployment.bucket.name,
        "IMAGE_SEARCH_S3_ENDPOINT": deployment.settings.s3_endpoint,
        "IMAGE_SEARCH_S3_ACCESS_KEY": deployment.settings.s3_access_key,
        "IMAGE_SEARCH_S3_SECRET_KEY": deployment.settings.s3_secret_key.get_secret_value(),
        "IMAGE_SEARCH_DATABASE_URL": deployment.settings.database_url.get_secret_value(),
    }
    by_name = {command.name: command for command in commands.commands}
    command = by_name[arguments[0]]
    # A loop of its own: the commands are programs.
    return await asyncio.to_thread(
        CliRunner().invoke, command, arguments[1:], obj=Path("no-such-folder"), env=environment, catch_exceptions=False
    )


async def test_put_and_scan_as_commands(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    (tmp_path / "pictures" / "one.jpg").write_bytes(b"1")
    (tmp_path / "pictures" / "sub" / "zwei ä.jpg").write_bytes(b"2")
    result = await _invoke(deployment, "put", str(tmp_path / "pictures"), "--prefix", "in/")
    assert result.exit_code == 0, result.output
    assert "2 of 2 files put" in result.output
    await deployment.bucket.head("in/sub/zwei ä.jpg")

    commands.NOBODY_SECONDS, patience = 1.0, commands.NOBODY_SECONDS
    result = await _invoke(deployment, "scan")
    commands.NOBODY_SECONDS = patience
    assert result.exit_code == 1
    assert "No bridge is working on the scan" in result.output

    async with deployment.bridge():
        result = await _invoke(deployment, "scan", "--prefix", "in/sub/", "--json")
        assert result.exit_code == 0, result.output
        assert '"state": "done"' in result.output
        assert '"compared": 1' in result.output


async def test_put_tells_of_each_file_that_failed(deployment: Deployment, tmp_path: Path) -> None:
    picture = tmp_path / "good.jpg"
    picture.write_bytes(b"1")
    result = await _invoke(deployment, "put", str(picture), "--bucket", "no-such-bucket")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "0 of 1 files put" in result.output
