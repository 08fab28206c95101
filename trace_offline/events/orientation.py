"""Which way a metric improves and on which scale its changes are compared."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from trace_offline.core.errors import UsageError, nearest
from trace_offline.estimators.history_levels import leading_run, mean_weights, trailing_run
from trace_offline.estimators.history_noise import Noise, estimate_noise
from trace_offline.estimators.krylov import Floats
from trace_offline.events.selection import Series

DIRECTIONS = ("auto", "rises", "falls")
_RISING = re.compile(
    r"(?:.*_)?(?:accuracy|acc|acc_norm|f1|mcc|exact_match|em|bleu|rouge\w*|chrf|auc|precision|recall|selectivity|"
    r"likelihood|log_likelihood)"
)
_FALLING = re.compile(
    r"(?:.*_)?(?:loss|nll|ppl|perplexity|calibration_error|error_rate|brier|brier_score|"
    r"bits_per_byte|bits_per_character|wer|ter)"
)
_MULTIPLICATIVE = re.compile(r"(?:.*_)?(?:ppl|perplexity)")
_WIDE = 1000.0


@dataclass(frozen=True)
class Oriented:
    """``values [n]`` rise when the metric improves (sign · value, or sign · log value); ``noise`` is theirs.

    ``direction``: rises or falls; ``source``: given, name, or net change; ``tails``: 2 when read from the values.
    """

    values: Floats
    noise: Noise
    sign: float
    logarithmic: bool
    direction: str
    source: str
    tails: int

    def plain(self, value: float) -> float:
        """A level of the oriented values in the unit of the metric."""
        level = self.sign * value
        return math.exp(level) if self.logarithmic else level


def known_direction(metric: str, direction: str = "auto") -> tuple[float, str] | None:
    """(sign, source) where the direction is given or the metric's name tells it; UsageError for an unknown one."""
    if direction not in DIRECTIONS:
        raise UsageError(
            f'--direction: "{direction}" is not known.{nearest(direction, DIRECTIONS)} '
            f"There are: {', '.join(DIRECTIONS)}."
        )
    if direction != "auto":
        return (1.0 if direction == "rises" else -1.0), "given"
    if _RISING.fullmatch(metric):
        return 1.0, "name"
    return (-1.0, "name") if _FALLING.fullmatch(metric) else None


def orient(series: Series, direction: str = "auto") -> Oriented:
    """Direction and scale of a series, and its noise.

    A perplexity, and any positive metric whose largest value is a thousand times its smallest or more, is compared in
    logarithms. Raises NoiseUnknown when the noise cannot be judged, UsageError for an unknown direction.
    """
    known = known_direction(series.key.metric, direction)
    metric, values, stderr = series.key.metric, series.values, series.stderr
    positive = bool(len(values)) and bool((values > 0).all())
    wide = positive and float(values.max()) >= _WIDE * float(values.min())
    logarithmic = positive and (wide or _MULTIPLICATIVE.fullmatch(metric) is not None)
    if logarithmic:
        values, stderr = np.log(values), stderr / values
    noise = estimate_noise(series.steps, values, stderr)
    sign, source = known or (_net_change(values, noise), "net change")
    return Oriented(
        values=sign * values,
        noise=noise,
        sign=sign,
        logarithmic=logarithmic,
        direction="rises" if sign > 0 else "falls",
        source=source,
        tails=2 if source == "net change" else 1,
    )


def _net_change(values: Floats, noise: Noise) -> float:
    """Sign of end minus start; where that is within two stderr, of the larger excursion from the start."""
    start = mean_weights(leading_run(values, noise))
    change = mean_weights(trailing_run(values, noise)) - start
    size = float(change @ values)
    if abs(size) > 2 * float(noise.contrast(change)[0]):
        return 1.0 if size > 0 else -1.0
    level = float(start @ values)
    return 1.0 if float(values.max()) - level >= level - float(values.min()) else -1.0
