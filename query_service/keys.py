"""What handlers find in the application, typed. One key a resource; app.py fills them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from infra.health import Check
from infra.kafka.interface import Broker
from infra.metadata_store.interface import MetadataStore
from infra.object_store.interface import ObjectStore
from infra.settings import QuerySettings
from infra.vector_store.interface import VectorStore
from processors.embedding.open_models import OpenModels
from query_service.admission import Admission
from query_service.event_feed import EventFeed
from query_service.freshness import FreshnessFollower
from query_service.key_ring import KeyRing
from query_service.search import Searcher
from query_service.settled import Settling
from schemas.access import Open, Scope

SETTINGS = web.AppKey("settings", QuerySettings)
OPENAPI = web.AppKey("openapi", bytes)
OBJECTS = web.AppKey("objects", ObjectStore)
METADATA = web.AppKey("metadata", MetadataStore)
VECTORS = web.AppKey("vectors", VectorStore)
BROKER = web.AppKey("broker", Broker)
MODELS = web.AppKey("models", OpenModels[Searcher])
SETTLING = web.AppKey("settling", Settling)
FEED = web.AppKey("feed", EventFeed)
FRESHNESS = web.AppKey("freshness", FreshnessFollower)
CHECKS = web.AppKey("checks", Mapping[str, Check])
SCOPES = web.AppKey("scopes", Mapping[tuple[str, str], Scope | Open])
"""What each route asks for, by method and path."""
KEY_RING = web.AppKey("key_ring", KeyRing)
SEARCHES = web.AppKey("searches", Admission)
CONTENTS = web.AppKey("contents", Admission)
UPLOADS = web.AppKey("uploads", Admission)
STOPPING = web.AppKey("stopping", asyncio.Event)
"""Set when the service begins to stop: streams that would never end by themselves end then."""
