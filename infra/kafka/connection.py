"""How the broker is reached, and its library's errors as ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, errors  # type: ignore[import-untyped]  # aiokafka ships no types

from infra.errors import StoreUnavailable
from infra.kafka.security import Security
from infra.metrics import store_error
from infra.settings import CommonSettings
from schemas.topics import Topic

STORE_NAME = "broker"


@dataclass(frozen=True, slots=True)
class Connection:
    """`prefix` is put before each topic and group. `timeout_seconds` bounds each call."""

    bootstrap: tuple[str, ...]
    prefix: str
    timeout_seconds: float
    security: Security = field(default_factory=Security)

    @classmethod
    def from_settings(cls, settings: CommonSettings) -> Connection:
        """Raises ConfigurationError for a file of a certificate that cannot be used."""
        return cls(
            settings.kafka_bootstrap,
            settings.kafka_topic_prefix,
            settings.kafka_timeout_seconds,
            Security.from_settings(settings),
        )

    @property
    def options(self) -> dict[str, Any]:
        """What every client of the library is made with."""
        return {
            "bootstrap_servers": list(self.bootstrap),
            "client_id": "image-search",
            "request_timeout_ms": int(self.timeout_seconds * 1000),
            **self.security.options,
        }

    def topic(self, topic: Topic) -> str:
        return topic.full_name(self.prefix)

    def group(self, group: str) -> str:
        return f"{self.prefix}{group}"

    def missing(self, topic: Topic) -> StoreUnavailable:
        return store_error(STORE_NAME, f"the topic {self.topic(topic)} is missing: run `image-search upgrade`")

    @asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """One time-out around a call. Everything that goes wrong at the broker comes out as StoreUnavailable."""
        try:
            async with asyncio.timeout(self.timeout_seconds):
                yield
        except errors.KafkaConnectionError as error:
            raise store_error(STORE_NAME, f"no way in at {', '.join(self.bootstrap)}: {self.security.doubts}") from error
        except errors.KafkaError as error:
            raise store_error(STORE_NAME, f"it answered {type(error).__name__}") from error
        except TimeoutError as error:
            raise store_error(STORE_NAME, f"no answer within {self.timeout_seconds:g} s") from error
        except OSError as error:
            raise store_error(STORE_NAME, f"the connection failed ({type(error).__name__})") from error

    async def ended(self, ending: Awaitable[None]) -> None:
        """Waits for a client's end. What goes wrong then must not hide what went wrong before, and nobody can use it."""
        with suppress(StoreUnavailable):
            async with self.bounded():
                await ending

    async def consumer_ended(self, consumer: AIOKafkaConsumer) -> None:
        """As `ended`, for a consumer of the library."""
        await self.ended(_stop(consumer))


async def _stop(consumer: AIOKafkaConsumer) -> None:
    task = asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        if task.cancelling() > cancelled_before:
            raise
        # Nobody cancelled us. aiokafka 0.14 cancels its own fetches, and one that waits to try again, because its broker is
        # away, hands that on to whoever stops it: our task would end without a word, and its connections would stay open.
        await consumer._client.close()
