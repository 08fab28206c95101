"""Inner products of the gradients of parts of the data, and the numbers that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_offline.analyzers._measurements import missing
from trace_offline.core.types import Measurement, Result

if TYPE_CHECKING:
    from torch import Tensor

    from trace_offline.activations.components import Place
    from trace_offline.analyzers._gradient_parts import Part, PartGradients, RestrictedLoss
    from trace_offline.estimators.clustered import Estimate

GIB = 1 << 30
_WHOLE = ("gradient_norm", "signal_to_noise", "gradient_cosine_halves")


class Products:
    """Inner products of part gradients. G parts; R rows: the whole loss, then the restricted ones."""

    mean: Tensor
    """Gradient of the mean loss ``[P]``."""

    def __init__(self, parts: Sequence[Part], widths: Sequence[tuple[Place, int]], n_losses: int) -> None:
        count = len(parts)
        self.places = list(widths)
        self.half = np.array([part.half for part in parts])
        self.sequences = np.array([len(part.rows) for part in parts], dtype=np.float64)
        # targets of the whole loss and of each restricted one
        self.targets = np.zeros((1 + n_losses, count))
        # by place: ⟨g, g⟩, ⟨g, Σ of half 0⟩, ⟨g, Σ of half 1⟩, ⟨g, Σ c g⟩
        self.whole = np.zeros((len(self.places), 4, count))
        # over all parameters: ⟨row, row of the same part⟩ and ⟨row, sum of a row⟩
        self.own = np.zeros((n_losses, n_losses, count))
        self.cross = np.zeros((n_losses, n_losses, count))

    @classmethod
    def of(
        cls,
        gradients: PartGradients,
        parts: Sequence[Part],
        widths: Sequence[tuple[Place, int]],
        n_losses: int,
        max_memory_gb: float,
    ) -> Products:
        """Two passes over the parts: sums first, then products with the sums.

        Gradients of the first pass are kept for the second where they fit, and computed again where they do not.
        """
        import torch

        found = cls(parts, widths, n_losses)
        # two halves, then the restricted losses; and the whole loss weighted by its targets
        sums = torch.zeros(2 + n_losses, gradients.size)
        weighted = torch.zeros(gradients.size)
        rows_in_all = 3 + n_losses + (1 + n_losses) * len(parts)
        keep = 4 * gradients.size * rows_in_all <= max_memory_gb * GIB
        kept: list[Tensor] = []
        for index, part in enumerate(parts):
            rows, targets = gradients.of(part)
            if index == 0:
                sums, weighted = sums.to(rows.device), weighted.to(rows.device)
            found.targets[:, index] = targets
            sums[part.half] += rows[0]
            sums[2:] += rows[1:]
            weighted += float(targets[0]) * rows[0]
            if keep:
                kept.append(rows)
        found.mean = (sums[0] + sums[1]) / float(found.targets[0].sum())
        for index, part in enumerate(parts):
            found.add(index, kept[index] if keep else gradients.of(part)[0], sums, weighted)
        return found

    def add(self, index: int, rows: Tensor, sums: Tensor, weighted: Tensor) -> None:
        """Products of part ``index``: ``rows [1 + losses, P]``, ``sums [2 + losses, P]`` (the halves first)."""
        start = 0
        for number, (_, width) in enumerate(self.places):
            mine = slice(start, start + width)
            start += width
            part, total = rows[:, mine].double(), sums[:, mine].double()
            first = part[0]
            self.whole[number, :, index] = [
                float(first @ first),
                float(first @ total[0]),
                float(first @ total[1]),
                float(first @ weighted[mine].double()),
            ]
            self.own[:, :, index] += (part[1:] @ part[1:].T).cpu().numpy()
            self.cross[:, :, index] += (part[1:] @ total[2:].T).cpu().numpy()

    def by_place(self, has_split: bool) -> Iterator[Result]:
        """Norm, signal-to-noise and cosine of halves: every layer × component, every layer, the network."""
        label = "train|test" if has_split else "half|half"
        blocks: dict[tuple[int | None, str], np.ndarray] = {}
        for (place, _), table in zip(self.places, self.whole, strict=True):
            blocks[place.layer, place.component] = table
        layers = {place.layer for place, _ in self.places if place.layer is not None}
        for layer in sorted(layers):
            mine = [table for (place, _), table in zip(self.places, self.whole, strict=True) if place.layer == layer]
            blocks[layer, "all"] = np.sum(mine, axis=0)
        blocks[None, "all"] = self.whole.sum(0)
        for key, table in blocks.items():
            yield from self._place(table, {"layer": key[0], "component": key[1]}, label)

    def _place(self, table: np.ndarray, where: dict[str, Any], label: str) -> Iterator[Result]:
        from trace_offline.estimators.gradient_noise import Parts, gradient_norm, signal_to_noise

        n = int(self.sequences.sum())
        if not np.isfinite(table).all():
            for metric in _WHOLE:
                extra = {"label": label} if metric == "gradient_cosine_halves" else {}
                yield missing(metric, "the gradient is not finite", n, **where, **extra)
            return
        parts = Parts(self.targets[0], self.sequences, table[0], table[1] + table[2], table[3])
        yield _measured("gradient_norm", gradient_norm(parts), n, where)
        try:
            yield _measured("signal_to_noise", signal_to_noise(parts), n, where)
        except ValueError as error:
            yield missing("signal_to_noise", str(error), n, **where)
        yield self._halves(table, n, where | {"label": label})

    def _halves(self, table: np.ndarray, n: int, where: dict[str, Any]) -> Result:
        from trace_offline.estimators.gradient_noise import gradient_cosine

        first, second = self.half == 0, self.half == 1
        if min(first.sum(), second.sum()) < 2:
            reason = f"{first.sum()} and {second.sum()} independent parts in the two halves; 2 are needed in each"
            return missing("gradient_cosine_halves", reason, n, **where)
        nothing = np.zeros(len(self.half))
        own = np.stack([np.where(first, table[0], 0), np.where(second, table[0], 0), nothing])
        try:
            found = gradient_cosine(
                np.where(first, table[1], 0),
                np.where(second, table[2], 0),
                np.where(first, table[2], 0),
                np.where(second, table[1], 0),
                own,
            )
        except ValueError as error:
            return missing("gradient_cosine_halves", str(error), n, **where)
        return _measured("gradient_cosine_halves", found, n, where)

    def by_class(self, losses: list[RestrictedLoss]) -> Iterator[Result]:
        """Norms of the classes' gradients and cosines of pairs: classes of one task, and tasks."""
        from trace_offline.estimators.gradient_noise import gradient_cosine

        broken = not (np.isfinite(self.own).all() and np.isfinite(self.cross).all())
        for index, loss in enumerate(losses):
            if loss.label is not None:
                yield self._class_norm(index, loss, broken)
        for (a, one), (b, other) in combinations(enumerate(losses), 2):
            of_tasks = one.label is None and other.label is None
            if not of_tasks and (one.task != other.task or one.label is None or other.label is None):
                continue
            label = f"{one.task}|{other.task}" if of_tasks else f"{one.label}|{other.label}"
            where: dict[str, Any] = {"component": "all", "task": None if of_tasks else one.task, "label": label}
            n = min(one.n_targets, other.n_targets)
            if broken:
                yield missing("gradient_cosine", "the gradient is not finite", n, **where)
                continue
            own = np.stack([self.own[a, a], self.own[b, b], self.own[a, b]])
            try:
                found = gradient_cosine(self.cross[a, a], self.cross[b, b], self.cross[a, b], self.cross[b, a], own)
            except ValueError as error:
                yield missing("gradient_cosine", str(error), n, **where)
            else:
                yield _measured("gradient_cosine", found, n, where)

    def _class_norm(self, index: int, loss: RestrictedLoss, broken: bool) -> Result:
        from trace_offline.estimators.gradient_noise import Parts, gradient_norm

        where = {"component": "all", "task": loss.task, "label": loss.label}
        if broken:
            return missing("class_gradient_norm", "the gradient is not finite", loss.n_targets, **where)
        parts = Parts(
            self.targets[1 + index],
            self.sequences,
            self.own[index, index],
            self.cross[index, index],
            np.zeros(len(self.sequences)),
        )
        return _measured("class_gradient_norm", gradient_norm(parts), loss.n_targets, where)


def _measured(metric: str, found: Estimate, n: int, where: dict[str, Any]) -> Result:
    return Measurement(metric, found.value, stderr=found.stderr, n=n, **where)
