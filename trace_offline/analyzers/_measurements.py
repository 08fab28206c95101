"""Small things several analyzers share: from an estimate to a measurement, reading predictions at scored places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trace_offline.core.errors import EvaluationSetError
from trace_offline.core.types import Measurement
from trace_offline.estimators.clustered import Estimate

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_NUMBERS = 1 << 23
"""Numbers of a ``[positions, classes]`` table looked at together (32 MB in float32)."""


def measurement(metric: str, estimate: Estimate, n: int, reason: str | None = None, **where: Any) -> Measurement:
    """An estimate as a measurement; ``reason`` says why its value is missing, and makes it missing when it is not."""
    if reason is not None or estimate.value is None or not math.isfinite(estimate.value):
        return Measurement(metric, None, n=n, reason=reason or "undefined: there is no observation", **where)
    return Measurement(metric, estimate.value, stderr=estimate.stderr, n=n, **where)


def missing(metric: str, reason: str, n: int | None = None, **where: Any) -> Measurement:
    """A number that cannot be measured, and why."""
    return Measurement(metric, None, n=n, reason=reason, **where)


def chunks(total: int, width: int) -> Iterator[slice]:
    """Slices of 0…total such that ``rows · width`` stays within ``CHUNK_NUMBERS``."""
    step = max(1, CHUNK_NUMBERS // max(1, width))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise EvaluationSetError when a label is no class of the network's output."""
    if targets.numel() and int(targets.max()) >= classes:
        raise EvaluationSetError(
            f"the evaluation set has the label {int(targets.max())}, but the network predicts the classes 0 to "
            f"{classes - 1}. Build the evaluation set with this checkpoint's tokenizer, or with its own labels."
        )


def not_finite(undefined: int, infinite: int, n: int) -> tuple[str | None, str | None]:
    """Reasons why (any metric, the loss) has no value: logits that are NaN; targets of probability 0."""
    broken = f"the logits of {undefined} of {n} predictions are not numbers" if undefined else None
    impossible = f"{infinite} of {n} targets have probability 0: the loss is infinite" if infinite else None
    return broken, broken or impossible
