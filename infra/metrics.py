"""Every metric, in one typed list: a typo in a name is a type error, and an operator reads here what there is."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from infra.errors import StoreUnavailable
from schemas.events import ReasonCode
from schemas.tables import JobState

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# -- all services ------------------------------------------------------------------------------------------------------
# Calls that failed because a store or the broker did not answer, whether they were tried again or given up.
STORE_ERRORS = Counter("image_search_store_errors_total", "Calls that a store did not answer", ["store"])

# -- ingest_bridge -----------------------------------------------------------------------------------------------------
# Object events written: where the bridge heard of it (log, topic, webhook, scan), by what it was caused, and whether something
# was put or removed. Puts seen are those with change="put" and cause="notification".
EVENTS_WRITTEN = Counter("image_search_events_written_total", "Object events written", ["source", "cause", "change"])
# Seconds from a change by the canary to its notification, by step: put or removal.
CANARY_SECONDS = Histogram("image_search_canary_seconds", "From a change to its notification", ["step"], buckets=_SECONDS)
# Trials that found no announcement (unseen) or notification rules that are not ours any more (rules).
CANARY_FAILURES = Counter("image_search_canary_failures_total", "Trials of the canary that failed", ["reason"])
# Requests to the webhook for notifications, by the status of their answer.
WEBHOOK_REQUESTS = Counter("image_search_webhook_requests_total", "Requests to the webhook", ["status"])
# Records of S3 notifications: passed on (of them with an unknown name), or left out (foreign bucket, no change, reserved key).
NOTIFICATION_RECORDS = Counter("image_search_notification_records_total", "Records of S3 notifications", ["result"])
# Scans that ended, by how: done, failed, or stopped by the guard against removing too much.
SCANS = Counter("image_search_scans_total", "Scans that ended", ["state"])

# -- processors --------------------------------------------------------------------------------------------------------
# Object events taken from the topic, by cause; a doubled notification counts twice.
EVENTS_READ = Counter("image_search_events_read_total", "Object events read", ["cause"])
# Events dropped at the look-up because the row already says it all.
EVENTS_KNOWN = Counter("image_search_events_known_total", "Events whose object was already up to date")
# Events in a batch: how well the work is bundled.
BATCH_EVENTS = Histogram(
    "image_search_batch_events", "Events of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
)
# Seconds of each step of a batch, by step.
STEP_SECONDS = Histogram("image_search_step_seconds", "Seconds of a step of a batch", ["step"], buckets=_SECONDS)
# From the event at the store until vector and row of an announced picture are both acknowledged. A search finds it when the
# vector store shows what it has acknowledged: at most IMAGE_SEARCH_VISIBILITY_BOUND_SECONDS later.
PUT_TO_ROW_SECONDS = Histogram("image_search_put_to_row_seconds", "From a put to its row", buckets=_SECONDS)
# Outcomes published, by type and reason.
OUTCOMES = Counter("image_search_outcomes_total", "Outcomes published", ["type", "reason"])
# Messages put aside, by reason.
DEAD_LETTERS = Counter("image_search_dead_letters_total", "Messages put aside", ["reason"])
# Calls that were tried again, by what was not available.
RETRIES = Counter("image_search_retries_total", "Calls tried again", ["store"])
# Writes refused because another writer had moved the row on.
GENERATION_CONFLICTS = Counter("image_search_generation_conflicts_total", "Writes that another writer was ahead of")
# Pictures by where their vector came from: embedded, or taken from a row with the same bytes.
VECTORS = Counter("image_search_vectors_total", "Vectors written", ["origin"])
# Events taken from the broker that wait for their batch: how deep the queue is.
EVENTS_QUEUED = Gauge("image_search_events_queued", "Events read and not yet in a batch")
# Events taken from the broker and not yet acknowledged.
EVENTS_IN_HAND = Gauge("image_search_events_in_hand", "Events read and not yet acknowledged")

# -- query_service -----------------------------------------------------------------------------------------------------
# Requests answered, by route (its pattern, never the path) and status.
HTTP_REQUESTS = Counter("image_search_http_requests_total", "HTTP requests answered", ["route", "method", "status"])
# Seconds until a request was answered; event streams are left out.
HTTP_SECONDS = Histogram("image_search_http_seconds", "Seconds of a request", ["route"], buckets=_SECONDS)
# Seconds of each step of a search, by step.
SEARCH_STEP_SECONDS = Histogram("image_search_search_step_seconds", "Seconds of a step of a search", ["step"], buckets=_SECONDS)
# Query pictures embedded by one call of the model: 1 as long as nobody waits for it.
QUERY_BATCH_PICTURES = Histogram(
    "image_search_query_batch_pictures", "Query pictures of a model call", buckets=(1, 2, 4, 8, 16, 32)
)
# Query pictures by where their vector came from: embedded, or recent (the same bytes were searched for before).
QUERY_VECTORS = Counter("image_search_query_vectors_total", "Vectors of query pictures", ["origin"])
# Nearest vectors that were not shown because their row says otherwise (overwritten or deleted meanwhile).
HITS_HIDDEN = Counter("image_search_hits_hidden_total", "Hits hidden by their row")
# Event streams open now.
EVENT_READERS = Gauge("image_search_event_readers", "Event streams open")
# Object events that no worker has acknowledged yet, over all partitions. Every query service shows the same.
OBJECTS_LAG = Gauge("image_search_objects_lag", "Object events not yet worked through")
# How long ago `indexed_through` was, seconds.
INDEXED_THROUGH_LAG_SECONDS = Gauge("image_search_indexed_through_lag_seconds", "Age of indexed_through")

# What alerts ask for is there from the start, as 0: a rate cannot see a counter's first step if it begins with that step.
for _reason in ReasonCode:
    DEAD_LETTERS.labels(_reason)
for _failure in ("rules", "unseen"):
    CANARY_FAILURES.labels(_failure)
for _state in (JobState.DONE, JobState.FAILED, JobState.STOPPED):
    SCANS.labels(_state)


def store_error(store: str, detail: str) -> StoreUnavailable:
    """What an adapter raises for a call that its store did not answer: made here, so that each is counted once."""
    STORE_ERRORS.labels(store).inc()
    return StoreUnavailable(store, detail)
