"""Decode processes that can be killed: a hostile picture costs itself, never its neighbours or the service."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

import structlog
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from infra.errors import ConfigurationError, ImageRejected, TransientError
from infra.settings import ModelSettings
from processors.child_process import confine
from processors.decode import Decoded, from_raster
from processors.raster import DecodeRules, Raster, Refusal, Renderer, render, render_all
from schemas.events import ReasonCode

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the upright picture."""

log = structlog.get_logger(__name__)

PICTURES_A_TASK = 16
"""Handing over a task costs about as much as half a picture: measured +50 % for one picture a task, +10 % for 16."""

TASK_TIMEOUT_FACTOR = 2
"""A task of several pictures gets at most this many times the time of one. A task that passes it is tried again picture
by picture, each with its full time, so this only bounds how long one that hangs keeps its neighbours waiting."""

START_SECONDS = 30.0
"""Longest wait for the processes to start, and for a task beyond its own time: then the pool is made anew."""

HEALTH_SECONDS = 0.25
"""Time between looks at the pool while a task is waited for: a pool that breaks just then may forget the task."""

POOLS_A_TASK = 3
"""How many pools a task may see break before decoding is reported as not working."""


class _PoolBroken(Exception):
    """The pool, not the picture: its processes were killed from outside, or a task was lost between them."""


class DecodePool:
    """Decodes pictures in processes of its own, which die with this process.

    Call start() before decode() and close() at the end, all in the thread of one event loop: the kernel ties the life of
    the decode processes to the thread that starts them.
    """

    def __init__(
        self,
        rules: DecodeRules,
        *,
        workers: int = 0,
        timeout_seconds: float = 5.0,
        memory_mib: int = 1024,
        renderer: Renderer = render,
    ) -> None:
        """`workers` 0: one for each processor. `timeout_seconds`: for one picture. `memory_mib`: for one process."""
        self._rules = rules
        self._workers = workers or len(os.sched_getaffinity(0))
        self._timeout = timeout_seconds
        self._memory_bytes = memory_mib * 1024 * 1024
        self._renderer = renderer
        self._pool: ProcessPool | None = None
        self._tasks_waited_for = 0
        self._endings: set[asyncio.Task[None]] = set()

    @classmethod
    def from_settings(cls, rules: DecodeRules, settings: ModelSettings) -> DecodePool:
        return cls(
            rules,
            workers=settings.decode_workers,
            timeout_seconds=settings.decode_timeout_seconds,
            memory_mib=settings.decode_memory_mib,
        )

    async def start(self) -> None:
        """Start the processes and wait until they work. Raises ConfigurationError when they cannot."""
        self._pool = self._new_pool()
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.gather(*(self._submit([], self._rules, self._timeout) for _ in range(self._workers)))
        except (_PoolBroken, ProcessExpired, TimeoutError):
            await self.close()
            raise ConfigurationError(
                "the decode processes do not start: is IMAGE_SEARCH_DECODE_MEMORY_MIB too small for this host?"
            ) from None

    async def decode(self, items: Sequence[bytes], box: Box | None = None) -> list[Decoded | ImageRejected]:
        """One answer for each item, in order: of all of it, or of a box in it (see DecodeRules).

        Raises TransientError when no decode process can be kept alive.
        """
        if not items:
            return []
        rules = self._rules if box is None else replace(self._rules, box=box)
        tasks = await asyncio.gather(*(self._run(part, rules) for part in _parts(items, self._workers)))
        return [
            from_raster(outcome, self._rules) if not isinstance(outcome, ImageRejected) else outcome
            for task in tasks
            for outcome in task
        ]

    async def close(self) -> None:
        """End every process and thread of the pool; pictures still being decoded are finished or time out first."""
        if self._pool is not None:
            self._end_soon(self._pool)
            self._pool = None
        await asyncio.gather(*self._endings)

    async def _run(self, pictures: Sequence[bytes], rules: DecodeRules) -> Sequence[Raster | Refusal | ImageRejected]:
        if len(pictures) == 1:
            return [await self._run_alone(pictures[0], rules)]
        try:
            return await self._try(pictures, rules, self._timeout * min(len(pictures), TASK_TIMEOUT_FACTOR))
        except (TimeoutError, ProcessExpired) as error:
            log.warning("decode task is tried again picture by picture", pictures=len(pictures), cause=type(error).__name__)
            return await asyncio.gather(*(self._run_alone(picture, rules) for picture in pictures))

    async def _run_alone(self, picture: bytes, rules: DecodeRules) -> Raster | Refusal | ImageRejected:
        for _ in range(2):
            try:
                return (await self._try([picture], rules, self._timeout))[0]
            except TimeoutError:
                return ImageRejected(ReasonCode.DECODE_TIMEOUT, f"Decoding took longer than {self._timeout:g} seconds.")
            except ProcessExpired as error:
                # Once more, because somebody from outside may have killed the process.
                log.warning("decode process ended under a picture", exit_code=error.exitcode, size=len(picture))
        return ImageRejected(ReasonCode.DECODE_CRASHED, "Decoding this picture ended the process that did it.")

    async def _try(self, pictures: Sequence[bytes], rules: DecodeRules, timeout: float) -> list[Raster | Refusal]:
        """Raises TimeoutError or ProcessExpired when it may be the pictures' doing, TransientError when it is not."""
        for _ in range(POOLS_A_TASK):
            pool = self._pool
            try:
                return await self._submit(pictures, rules, timeout)
            except _PoolBroken:
                if pool is not None and pool is self._pool:
                    log.warning("decode pool is made anew")
                    self._pool = self._new_pool()
                    self._end_soon(pool)
        raise TransientError("decode processes end as soon as they are started")

    async def _submit(self, pictures: Sequence[bytes], rules: DecodeRules, timeout: float) -> list[Raster | Refusal]:
        pool = self._pool
        if pool is None:
            raise TransientError("the decode pool is not running")
        try:
            future: ProcessFuture[list[Raster | Refusal]] = pool.schedule(
                render_all, args=(pictures, rules, self._renderer), timeout=timeout
            )
        except RuntimeError as error:
            raise _PoolBroken from error
        waiting = asyncio.wrap_future(future)
        self._tasks_waited_for += 1
        # The time-out above runs from a task's start. A task that was lost between pool and process never starts.
        patience = START_SECONDS + timeout * TASK_TIMEOUT_FACTOR * math.ceil(self._tasks_waited_for / self._workers)
        give_up = time.monotonic() + patience
        try:
            while not (await asyncio.wait({waiting}, timeout=HEALTH_SECONDS))[0]:
                if time.monotonic() > give_up or not pool.active:
                    raise _PoolBroken
            return waiting.result()
        except BrokenProcessPool as error:
            raise _PoolBroken from error
        finally:
            self._tasks_waited_for -= 1
            waiting.cancel()

    def _new_pool(self) -> ProcessPool:
        # Spawned, not forked: a fork copies the locks that other threads (the model, the broker's client) hold just then.
        return ProcessPool(
            max_workers=self._workers,
            initializer=confine,
            initargs=(os.getpid(), self._memory_bytes),
            context=multiprocessing.get_context("spawn"),
        )

    def _end_soon(self, pool: ProcessPool) -> None:
        ending = asyncio.get_running_loop().create_task(asyncio.to_thread(_end, pool, self._timeout * TASK_TIMEOUT_FACTOR))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


def _parts(items: Sequence[bytes], workers: int) -> list[Sequence[bytes]]:
    """Parts of nearly one size, as few as PICTURES_A_TASK allows, and enough to keep every worker busy."""
    rounds = math.ceil(len(items) / (PICTURES_A_TASK * workers))
    parts = min(len(items), rounds * workers)
    edges = [len(items) * part // parts for part in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def _end(pool: ProcessPool, grace_seconds: float) -> None:
    pool.close()  # type: ignore[no-untyped-call]  # pebble is typed, but for this
    try:
        pool.join(timeout=grace_seconds)
    except TimeoutError:
        pool.stop()  # type: ignore[no-untyped-call]  # pebble is typed, but for this
        pool.join()
