"""What a person and a machine see of the trials."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from infra.vector_store.index import VectorIndex
from query_service.index_tuning.trials import Trial, Tuning

MIB = 2**20


def variables(index: VectorIndex) -> dict[str, str]:
    """The settings that ask for this index: first those of its making, then those of its searches."""
    own: dict[str, int] = {}
    match index.kind:
        case "HNSW":
            own = {"INDEX_LINKS": index.links, "INDEX_BUILD_EFFORT": index.build_effort, "SEARCH_EFFORT": index.search_effort}
        case "IVF_FLAT" | "IVF_SQ8":
            own = {"INDEX_LISTS": index.lists, "SEARCH_LISTS": index.search_lists}
        case "FLAT":
            pass
    return {f"IMAGE_SEARCH_MILVUS_{name}": str(value) for name, value in {"INDEX": index.kind, **own}.items()}


def document(tuning: Tuning) -> dict[str, Any]:
    return {
        "collection": tuning.sample.collection,
        "rows": tuning.sample.rows,
        "sampled": len(tuning.sample.stored),
        "queries": len(tuning.sample.queries),
        "recall_goal": tuning.goal,
        "trials": [_trial(trial) for trial in tuning.trials],
        "recommended": _trial(tuning.recommended) if tuning.recommended else None,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "index": trial.index.kind,
        "build": trial.index.build_parameters,
        "recall_at_10": round(trial.recall, 4),
        "p50_ms": round(trial.p50_ms, 3),
        "p99_ms": round(trial.p99_ms, 3),
        "memory_bytes": trial.memory_bytes,
        "build_seconds": round(trial.build_seconds, 1),
        "settings": variables(trial.index),
    }


def show(tuning: Tuning, console: Console) -> None:
    sample = tuning.sample
    title = f"{sample.collection}: {len(sample.stored):,} of {sample.rows:,} vectors, {len(sample.queries)} queries"
    table = Table("index", "search", "recall@10", "p50 ms", "p99 ms", "memory MiB", "build s", "", title=title)
    for column in range(2, 7):
        table.columns[column].justify = "right"
    for trial in tuning.trials:
        table.add_row(
            _described(trial.index),
            _searched(trial.index),
            f"{trial.recall:.4f}",
            f"{trial.p50_ms:.2f}",
            f"{trial.p99_ms:.2f}",
            f"{trial.memory_bytes / MIB:,.1f}",
            f"{trial.build_seconds:.1f}",
            "recommended" if trial is tuning.recommended else "",
        )
    console.print(table)
    console.print("memory is computed for all rows of the collection; recall and times are of the copy")
    if not sample.whole:
        console.print(
            "FLAT compares all vectors, and this is a part of them: it is not recommended; a larger --sample says more"
        )
    if tuning.recommended is None:
        console.print(f"nothing reaches a recall of {tuning.goal:g}: give a lower --recall, or a larger --sample")
        return
    console.print(f"recommended: the fastest with a recall of {tuning.goal:g} or more")
    for name, value in variables(tuning.recommended.index).items():
        console.print(f"  {name}={value}")
    console.print("settings of the search hold from the next start; an index is made with its collection (docs/tuning.md)")


def _described(index: VectorIndex) -> str:
    return " ".join([index.kind, *(f"{name}={value}" for name, value in index.build_parameters.items())])


def _searched(index: VectorIndex) -> str:
    match index.kind:
        case "HNSW":
            return f"ef={index.search_effort}"
        case "IVF_FLAT" | "IVF_SQ8":
            return f"nprobe={index.search_lists}"
        case "FLAT":
            return ""
