"""Writing to the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # aiokafka ships no types
from aiokafka.errors import KafkaError, MessageSizeTooLargeError  # type: ignore[import-untyped]  # aiokafka ships no types

from infra.errors import InvalidEvent
from infra.kafka.admin import Inspector
from infra.kafka.connection import Connection
from infra.kafka.interface import Message
from infra.kafka.limits import check_size
from schemas.events import ReasonCode
from schemas.topics import Topic

# A batch counts as one message at the broker, so it must stay below the smallest limit that a topic has.
BATCH_BYTES = 256 * 1024
# Sizes are checked here against each topic's own limit; the library's one limit for all would only come in between.
LIBRARY_MESSAGE_BYTES = 64 * 1024 * 1024


class KafkaProducer:
    """See Producer. Idempotent, so that the library's own retries neither double nor reorder.

    An idempotent batch never expires in the library: whoever is told that a send timed out and sends again adds to a heap
    that grows for as long as the broker is away. So after a time-out nothing more is taken until what is in doubt has either
    arrived or failed. That also keeps the order: what comes again comes behind its first copy.
    """

    def __init__(self, connection: Connection, inspector: Inspector) -> None:
        self._connection = connection
        self._inspector = inspector
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._in_doubt = False
        self._retired: asyncio.Task[None] | None = None
        self._topics: set[str] = set()

    async def send(self, topic: Topic, messages: Sequence[Message]) -> None:
        for message in messages:
            check_size(topic, message)
        if not messages:
            return
        async with self._connection.bounded():
            await self._check_topic(topic)
            producer = await self._ready()
            try:
                await self._send(producer, self._connection.topic(topic), messages)
            except MessageSizeTooLargeError as error:
                self._retire(producer)
                raise InvalidEvent(ReasonCode.EVENT_INVALID, "the broker takes no message of this size") from error
            except KafkaError:
                # A batch that failed leaves a gap in its partition's sequence, and all later ones would be refused.
                self._retire(producer)
                raise
            except asyncio.CancelledError:
                self._in_doubt = True
                raise

    async def close(self) -> None:
        if self._producer is not None:
            self._retire(self._producer)
        if self._retired is not None:
            await asyncio.wait([self._retired], timeout=self._connection.timeout_seconds)
            if not self._retired.done():
                self._retired.cancel()
                await asyncio.wait([self._retired])

    async def _send(self, producer: AIOKafkaProducer, name: str, messages: Sequence[Message]) -> None:
        waiting = []
        for message in messages:
            headers = [(key, value.encode()) for key, value in message.headers.items()]
            waiting.append(await producer.send(name, message.value, key=message.key, headers=headers))
        await asyncio.gather(*waiting)

    async def _check_topic(self, topic: Topic) -> None:
        # A broker that creates topics by itself would make a missing one with its own settings and number of partitions.
        name = self._connection.topic(topic)
        if name not in self._topics:
            await self._inspector.partitions(topic)
            self._topics.add(name)

    async def _ready(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._retired is not None:
                await asyncio.wait([self._retired])
                self._retired = None
            if self._producer is None:
                self._producer = await self._started()
            if self._in_doubt:
                await self._producer.flush()
                self._in_doubt = False
            return self._producer

    async def _started(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **self._connection.options,
            enable_idempotence=True,
            acks="all",
            max_batch_size=BATCH_BYTES,
            max_request_size=LIBRARY_MESSAGE_BYTES,
        )
        try:
            await producer.start()
        except BaseException:
            await self._connection.ended(producer.stop())
            raise
        return producer

    def _retire(self, producer: AIOKafkaProducer) -> None:
        """Let go of a producer that has failed. It ends when it has delivered what others gave it; the next waits for that."""
        if producer is not self._producer:
            return
        self._producer = None
        self._in_doubt = False
        self._retired = asyncio.create_task(self._end(producer))

    async def _end(self, producer: AIOKafkaProducer) -> None:
        try:
            with suppress(KafkaError, OSError):
                await producer.stop()
        finally:
            await producer.client.close()  # cancelled while it waits for an absent broker, stop() leaves it open
