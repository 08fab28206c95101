"""Fitted probes as things one can keep: applied to other hidden states, written as an artifact, loaded again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trace_offline.core.errors import UsageError, nearest

FORMAT = "trace-offline probes 1"
_LINEAR = ("weight", "bias")
_MLP = ("hidden_weight", "hidden_bias", "weight", "bias")


@dataclass(frozen=True)
class Probe:
    """One probe of one layer: ``mean [D]``, ``scale [D]`` (float64) of its training words, then its layers.

    ``tensors``: ``weight [K, D]``, ``bias [K]``; with a hidden layer of width H also ``hidden_weight [H, D]`` and
    ``hidden_bias [H]``, and then ``weight`` is ``[K, H]``.
    """

    mean: Tensor
    scale: Tensor
    tensors: Mapping[str, Tensor]

    def standardised(self, hidden: Tensor) -> Tensor:
        """``[m, D]`` in the units the probe was fitted in, float32."""
        return ((hidden.double() - self.mean) * self.scale).float()

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[m, D]`` as the network makes them → ``log p [m, K]`` in float32."""
        x = self.standardised(hidden)
        parts = self.tensors
        if "hidden_weight" in parts:
            x = (x @ parts["hidden_weight"].T + parts["hidden_bias"]).relu()
        return (x @ parts["weight"].T + parts["bias"]).log_softmax(-1)


@dataclass(frozen=True)
class LoadedProbes:
    """The probes of one analysis, as ``load_probe`` returns them.

    ``classes``: task → names of the classes the probes tell apart, in the order of their outputs. ``alignment`` and
    ``view``: which hidden states the probes were fitted to.
    """

    kind: str
    alignment: str
    view: str
    classes: Mapping[str, tuple[str, ...]]
    probes: Mapping[tuple[str, int], Probe]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with at least one probe, sorted."""
        return tuple(sorted({task for task, _ in self.probes}))

    def layers(self, task: str) -> tuple[int, ...]:
        """Layers with a probe of this task."""
        return tuple(sorted(layer for name, layer in self.probes if name == task))

    def probe(self, task: str, layer: int) -> Probe:
        """One probe. Raises UsageError when there is none."""
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none"
            raise UsageError(f'no probe of task "{task}" in this file.{nearest(task, self.tasks)} Its tasks: {known}.')
        if (task, layer) not in self.probes:
            known = ", ".join(str(n) for n in self.layers(task))
            raise UsageError(f'no probe of task "{task}" at layer {layer} in this file; its layers: {known}.')
        return self.probes[task, layer]

    def log_probabilities(self, task: str, layer: int, hidden: Tensor) -> Tensor:
        """``hidden [m, D]`` → ``[m, K]``, classes in the order of ``classes[task]``. Raises UsageError."""
        probe = self.probe(task, layer)
        if hidden.dim() != 2 or hidden.shape[1] != len(probe.mean):
            raise UsageError(
                f"expected hidden states [words, {len(probe.mean)}] for this probe, found {tuple(hidden.shape)}."
            )
        return probe.log_probabilities(hidden.cpu())

    def predict(self, task: str, layer: int, hidden: Tensor) -> list[str]:
        """The most probable class of every row of ``hidden [m, D]``, by name. Raises UsageError."""
        names = self.classes.get(task, ())
        return [names[k] for k in self.log_probabilities(task, layer, hidden).argmax(1).tolist()]


def dump_probes(
    probes: Mapping[tuple[str, int], Probe],
    classes: Mapping[str, Sequence[str]],
    *,
    kind: str,
    alignment: str,
    view: str,
) -> bytes:
    """A safetensors file: tensors ``task/layer/name``, everything else in its metadata."""
    from safetensors.torch import save

    tasks = sorted({task for task, _ in probes})
    tensors = {}
    for (task, layer), probe in probes.items():
        for name, tensor in {"mean": probe.mean, "scale": probe.scale, **probe.tensors}.items():
            tensors[f"{tasks.index(task)}/{layer}/{name}"] = tensor.clone().contiguous()
    about = {
        "format": FORMAT,
        "kind": kind,
        "alignment": alignment,
        "view": view,
        "tasks": json.dumps(tasks),
        "classes": json.dumps({task: list(classes[task]) for task in tasks}),
    }
    return bytes(save(tensors, metadata=about))


def load_probe(path: str | Path) -> LoadedProbes:
    """The probes that the analyzer ``probe`` kept with ``weights=true``; nothing in the file is executed.

    Raises UsageError for a file that is missing, unreadable, or not made by it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            about = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file. The table artifacts of the store names the files there are.") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path}: not a safetensors file ({error}); expected an artifact of the analyzer probe."
        ) from None
    if about.get("format") != FORMAT:
        raise UsageError(
            f'{path}: expected probes in the format "{FORMAT}", found "{about.get("format", "none")}". Give an '
            "artifact of the analyzer probe (weights=true)."
        )
    tasks = json.loads(about["tasks"])
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        task, layer, part = name.split("/")
        parts.setdefault((tasks[int(task)], int(layer)), {})[part] = tensor
    names = _MLP if about["kind"] == "mlp" else _LINEAR
    probes = {}
    for key, found in parts.items():
        if set(found) != {"mean", "scale", *names}:
            raise UsageError(f"{path}: the probe of {key[0]} at layer {key[1]} is incomplete; write it anew.")
        probes[key] = Probe(found["mean"], found["scale"], {name: found[name] for name in names})
    classes = {task: tuple(listed) for task, listed in json.loads(about["classes"]).items()}
    return LoadedProbes(about["kind"], about["alignment"], about["view"], classes, probes)


def scaling(rows: Tensor, constant: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and 1/standard deviation ``[D]`` in float64 of ``rows [n, D]``.

    A feature that is constant (spread below ``constant`` of its largest value, the noise of float32) has scale 0.
    """
    rows = rows.double()
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    varies = deviation > constant * rows.abs().amax(0)
    return mean, torch.where(varies, 1.0 / deviation.where(varies, 1.0), 0.0)
