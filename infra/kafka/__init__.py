"""The broker: the only home of aiokafka, beside the worker's own consumer (Faust: processors/app.py)."""

from __future__ import annotations

from infra.kafka.client import KafkaBroker
from infra.kafka.interface import Broker, GroupReader, Message, PartitionLag, Producer, Record
from infra.settings import CommonSettings

__all__ = ["Broker", "GroupReader", "Message", "PartitionLag", "Producer", "Record", "connect"]


async def connect(settings: CommonSettings) -> Broker:
    """A client for the broker of these settings. Nothing is sent before its first call; close it in the end."""
    return KafkaBroker.from_settings(settings)
