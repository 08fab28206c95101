"""Hidden states of the shared pass kept in a file, and handed to collectors again as if the network had run.

Kept are the places that collectors read, as the network gave them: its number type, all layers, and how rows were cut
into batches. Handing them out again repeats those very batches, so that a collector does the same arithmetic on the
same bits in the same order. What was not kept is NaN there: a collector that reads more than it says gets no number.

Shape letters: B sequences of a batch, T positions, D width, L blocks, M places kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trace_offline.activations.batch import Collector, ForwardBatch
from trace_offline.activations.forward import TokenSource, hand_out, trimmed
from trace_offline.activations.places import Places

FORMAT = "1"
"""Changes with what the file holds, and with what the shared pass does: older files are then computed anew."""


def _batch(index: int) -> str:
    return f"hidden.{index}"


class Recorder:
    """A collector that keeps the hidden states at ``places``, until they take more than ``most_bytes``."""

    needs_hidden = True
    needs_logits = False

    def __init__(self, places: Places, most_bytes: int) -> None:
        self.places = places
        self.most_bytes = most_bytes
        self.n_bytes = 0
        self._batches: list[tuple[int, int]] = []
        self._parts: list[Tensor] = []
        self._tokens: list[np.ndarray] = []

    @property
    def empty(self) -> bool:
        """The pass had no batch."""
        return not self._batches

    @property
    def too_large(self) -> bool:
        """More than ``most_bytes`` were asked for: nothing is kept."""
        return self.n_bytes > self.most_bytes

    def update(self, batch: ForwardBatch) -> None:
        """Copy what is asked for of this batch."""
        assert batch.hidden is not None
        rows, length = batch.input_ids.shape
        if self.too_large:
            return
        first = int(batch.examples[0])
        self._batches.append((first, first + rows))
        b, t = self.places.within(first, rows, length)
        at = torch.from_numpy(b).to(batch.input_ids.device), torch.from_numpy(t).to(batch.input_ids.device)
        part = torch.stack([layer[at] for layer in batch.hidden], dim=1).cpu()
        self.n_bytes += part.numel() * part.element_size()
        if self.too_large:
            self._parts.clear()
            return
        self._parts.append(part)
        self._tokens.append(Places.at(b + first, t).tokens)

    def finish(self) -> Recorder:
        """Itself."""
        return self

    def save(self, path: Path, sources: Mapping[str, str]) -> None:
        """Write ``hidden.i [M_i, L+1, D]`` of batch i, the tokens these are, the whole rows, and ``batches [K, 2]``."""
        from safetensors.torch import save_file

        tensors = {
            **{_batch(index): part for index, part in enumerate(self._parts)},
            "tokens": torch.from_numpy(np.concatenate(self._tokens)),
            "rows": torch.from_numpy(self.places.rows),
            "batches": torch.tensor(self._batches, dtype=torch.int64),
        }
        save_file(tensors, path, metadata={"format": FORMAT, "sources": json.dumps(dict(sources))})


@dataclass(frozen=True)
class Kept:
    """A file of hidden states. ``sources``: file of the network's code → its digest when the network ran.

    ``stream`` is the open file: what is removed meanwhile, to make room, can still be read.
    """

    stream: Any
    places: Places
    n_layers: int
    sources: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Kept | None:
        """What a file holds; None when it is of another format. Raises OSError or SafetensorError."""
        from safetensors import safe_open

        stream: Any = safe_open(path, framework="pt")
        about = stream.metadata() or {}
        if about.get("format") != FORMAT:
            return None
        places = Places(stream.get_tensor("tokens").numpy(), stream.get_tensor("rows").numpy())
        layers = stream.get_slice(_batch(0)).get_shape()[1]
        return cls(stream, places, layers - 1, json.loads(about["sources"]))

    def batches(self, evaluation: TokenSource, device: str) -> Iterator[ForwardBatch]:
        """The batches of the pass again, one at a time in memory."""
        for index, (start, stop) in enumerate(self.stream.get_tensor("batches").tolist()):
            ids, mask, targets = (part.to(device) for part in trimmed(evaluation.tokens(start, stop)))
            b, t = self.places.within(start, *ids.shape)
            at = torch.from_numpy(b), torch.from_numpy(t)
            layers = []
            for part in self.stream.get_tensor(_batch(index)).unbind(1):
                states = torch.full((*ids.shape, part.shape[-1]), torch.nan, dtype=part.dtype)
                states[at] = part
                layers.append(states.to(device))
            yield ForwardBatch(torch.arange(start, stop, device=device), ids, mask, targets, tuple(layers))


def replay(
    kept: Kept, evaluation: TokenSource, collectors: Mapping[str, Collector], device: str
) -> dict[str, BaseException]:
    """Like ``run_pass``, from the file: every collector sees every batch; those that raised are returned by name."""
    dropped: dict[str, BaseException] = {}
    active = dict(collectors)
    for batch in kept.batches(evaluation, device):
        if not active:
            break
        for name, error in hand_out(batch, active):
            del active[name]
            dropped[name] = error
    return dropped
