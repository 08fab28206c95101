"""Clouds of known intrinsic dimension: those of the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_dimension_bias import manifold

__all__ = ["manifold"]
