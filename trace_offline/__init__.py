"""trace-offline: measure what a language model learned, checkpoint by checkpoint, after training.

>>> import trace_offline
>>> trace_offline.analyze(source, evaluation_set, store)          # doctest: +SKIP
>>> trace_offline.Store.open(store).sql("select * from history")  # doctest: +SKIP

Importing this module loads neither torch nor transformers; each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_offline.analyzers.base import (
        Analyzer,
        Context,
        Extract,
        MetricSpec,
        Need,
        Scope,
        SeriesAnalyzer,
        SeriesContext,
    )
    from trace_offline.analyzers.probe_weights import load_probe
    from trace_offline.api import analyze, find_events, rerun
    from trace_offline.checkpoints.discover import discover
    from trace_offline.core.errors import (
        CheckpointError,
        EvaluationSetError,
        NotApplicable,
        StoreError,
        TraceOfflineError,
        UsageError,
    )
    from trace_offline.core.params import Params
    from trace_offline.core.types import Array, Artifact, Checkpoint, CheckpointState, Measurement
    from trace_offline.evaluation.build import build_evaluation_set
    from trace_offline.evaluation.evaluation_set import EvaluationSet
    from trace_offline.importers.writing import import_lm_eval
    from trace_offline.query.reader import Store

_WHERE = {
    "discover": "trace_offline.checkpoints.discover",
    "build_evaluation_set": "trace_offline.evaluation.build",
    "EvaluationSet": "trace_offline.evaluation.evaluation_set",
    "load_probe": "trace_offline.analyzers.probe_weights",
    "analyze": "trace_offline.api",
    "rerun": "trace_offline.api",
    "find_events": "trace_offline.api",
    "import_lm_eval": "trace_offline.importers.writing",
    "Store": "trace_offline.query.reader",
    **dict.fromkeys(
        ("Analyzer", "Context", "Extract", "MetricSpec", "Need", "Scope", "SeriesAnalyzer", "SeriesContext"),
        "trace_offline.analyzers.base",
    ),
    "Params": "trace_offline.core.params",
    **dict.fromkeys(("Array", "Artifact", "Checkpoint", "CheckpointState", "Measurement"), "trace_offline.core.types"),
    **dict.fromkeys(
        ("CheckpointError", "EvaluationSetError", "NotApplicable", "StoreError", "TraceOfflineError", "UsageError"),
        "trace_offline.core.errors",
    ),
}

__all__ = [
    "Analyzer",
    "Array",
    "Artifact",
    "Checkpoint",
    "CheckpointError",
    "CheckpointState",
    "Context",
    "EvaluationSet",
    "EvaluationSetError",
    "Extract",
    "Measurement",
    "MetricSpec",
    "Need",
    "NotApplicable",
    "Params",
    "Scope",
    "SeriesAnalyzer",
    "SeriesContext",
    "Store",
    "StoreError",
    "TraceOfflineError",
    "UsageError",
    "analyze",
    "build_evaluation_set",
    "discover",
    "find_events",
    "import_lm_eval",
    "load_probe",
    "rerun",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'trace_offline' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
