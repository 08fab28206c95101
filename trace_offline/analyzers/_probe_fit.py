"""Fit the probes of a checkpoint: all layers, tasks, repetitions and label sets as one list of problems.

Shape letters: L+1 layers, U words of the table, M words of one task, D width, K classes, S label sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_offline.analyzers._probe_data import Prepared
from trace_offline.analyzers.probe_weights import Probe, scaling
from trace_offline.estimators.clustered import Codes
from trace_offline.estimators.description_length import Fit, block_ends, linear_fit, online_code
from trace_offline.estimators.logistic import LogisticProblems, Problem, fit_path
from trace_offline.estimators.mlp_probe import MlpFit, fit_mlp
from trace_offline.estimators.splits import Part

MEMORY_NUMBERS = 1 << 27
"""Numbers held for the problems that are solved together (512 MB in float32)."""

PATH_TOLERANCE = 20.0
"""Times the tolerance while penalties are compared on validation words: their NLL differs by far more than that."""


@dataclass(frozen=True)
class FitOptions:
    """How probes are fitted. ``fractions``: ends of the blocks of the online code, or None for no code."""

    penalties: Sequence[float]
    tolerance: float = 5e-4
    max_iterations: int = 500
    kind: str = "linear"
    hidden_width: int = 64
    max_passes: int = 100
    patience: int = 5
    seed: int = 0
    fractions: Sequence[float] | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Request:
    """Probes on ``matrix [U, D]`` (hidden states of one layer, finite) for the words and parts of ``prepared``: one for
    each of the label sets ``labels [S][M]``, 0…classes−1. ``code``: also its online code, if codes are asked for.
    """

    matrix: Tensor
    prepared: Prepared
    labels: Sequence[Codes]
    classes: int
    seed: int = 0
    code: bool = True


@dataclass(frozen=True)
class Fitted:
    """For each label set of a request the probe and its penalty (None with a hidden layer); whether all converged;
    ``bits [S, n]`` of the labels of the training words in their order, or None.
    """

    probes: list[Probe]
    penalties: list[float | None]
    converged: bool
    bits: NDArray[np.float64] | None


def standardise(table: Tensor, train: Tensor) -> Tensor:
    """``[L, M, D]`` → zero mean and unit variance over the rows ``train`` of every layer, computed in float64.

    A feature that is constant over the training rows (relative spread below 1e-6, the noise of float32) becomes 0.
    """
    return torch.stack([Probe(*scaling(matrix[train]), {}).standardised(matrix) for matrix in table])


def fit_requests(requests: Sequence[Request], options: FitOptions) -> list[Fitted]:
    """Fit everything that is asked for, as few batches of problems as memory allows.

    Linear: the penalty of each probe is the one with the lowest validation NLL; the probe is then refit at it on
    training and validation words together. With a hidden layer: fitted to the training words, ended by validation NLL.
    """
    fit = _fit_mlp if options.kind == "mlp" else _fit_linear
    return [found for piece in _pieces(requests, options) for found in fit(_Batch(piece, options))]


def _pieces(requests: Sequence[Request], options: FitOptions) -> Iterator[list[Request]]:
    """Consecutive requests whose problems fit into memory together; at least one."""
    piece: list[Request] = []
    used = 0
    for request in requests:
        words, width, sets = len(request.prepared.label), request.matrix.shape[1], len(request.labels)
        numbers = words * (4 * width + 6 * sets * request.classes) + 104 * sets * request.classes * width
        if options.fractions is not None and request.code:
            numbers *= 3
        if piece and used + numbers > MEMORY_NUMBERS:
            yield piece
            piece, used = [], 0
        piece.append(request)
        used += numbers
    if piece:
        yield piece


class _Batch:
    """Requests as feature matrices (standardised) and problems; requests on the same rows of a layer share them."""

    def __init__(self, requests: list[Request], options: FitOptions) -> None:
        self.requests, self.options = requests, options
        self.features: list[Tensor] = []
        self.scales: list[tuple[Tensor, Tensor]] = []
        self.designs: list[int] = []
        self.first: list[Request] = []
        known: dict[tuple[int, bytes, bytes, int], int] = {}
        for request in requests:
            words = request.prepared.words
            key = (id(request.matrix), words.where.tobytes(), words.part.tobytes(), request.seed)
            if key not in known:
                known[key] = len(self.features)
                raw = request.matrix[torch.from_numpy(words.where)]
                scale = scaling(raw[torch.from_numpy(request.prepared.at(Part.TRAIN))])
                self.scales.append(scale)
                self.features.append(Probe(*scale, {}).standardised(raw).to(options.device))
                self.first.append(request)
            self.designs.append(known[key])
        ends = np.cumsum([len(request.labels) for request in requests]).tolist()
        self.numbers = [range(end - len(request.labels), end) for request, end in zip(requests, ends, strict=True)]
        self.seeds = [request.seed for request in requests for _ in request.labels]
        self.coded = [
            number
            for request, numbers in zip(requests, self.numbers, strict=True)
            for number in numbers
            if request.code and options.fractions is not None
        ]

    def on(self, *parts: Part) -> tuple[list[Tensor], list[Problem]]:
        """Feature matrices of the rows of these parts, and the problems of all label sets in order."""
        return self.at([np.concatenate([request.prepared.at(part) for part in parts]) for request in self.first])

    def at(self, rows: Sequence[NDArray[np.integer]]) -> tuple[list[Tensor], list[Problem]]:
        """The same for row numbers of each feature matrix."""
        device = self.options.device
        features = [matrix[torch.from_numpy(here).to(device)] for matrix, here in zip(self.features, rows, strict=True)]
        # layers of a task differ in features only: they share their labels
        cut: dict[tuple[int, int], Tensor] = {}
        problems = []
        for request, design in zip(self.requests, self.designs, strict=True):
            for codes in request.labels:
                key = (id(codes), id(request.prepared))
                if key not in cut:
                    cut[key] = torch.from_numpy(codes[rows[design]]).to(device)
                problems.append(Problem(design, cut[key], request.classes))
        return features, problems

    def codes(self, fit: Fit) -> list[NDArray[np.float64] | None]:
        """Bits ``[S, n]`` of the training labels for each request."""
        found: list[NDArray[np.float64] | None] = [None] * len(self.requests)
        if not self.coded:
            return found
        assert self.options.fractions is not None
        orders = [_sending_order(request.prepared, request.seed) for request in self.first]
        ends = [
            block_ends(request.prepared.words.group[order], self.options.fractions)
            for request, order in zip(self.first, orders, strict=True)
        ]
        features, problems = self.at(orders)
        sent = online_code(features, [problems[number] for number in self.coded], ends, fit)
        by_number = dict(zip(self.coded, sent, strict=True))
        for place, (request, design) in enumerate(zip(self.requests, self.designs, strict=True)):
            if request.code:
                bits = np.stack([by_number[number] for number in self.numbers[place]])
                found[place] = np.empty_like(bits)
                found[place][:, np.searchsorted(request.prepared.at(Part.TRAIN), orders[design])] = bits  # type: ignore[index]
        return found

    def fitted(
        self,
        tensors: Sequence[dict[str, Tensor]],
        penalties: Sequence[float | None],
        converged: Sequence[bool],
        bits: Sequence[NDArray[np.float64] | None],
    ) -> Iterator[Fitted]:
        """What was found for all problems, request by request."""
        for numbers, design, sent in zip(self.numbers, self.designs, bits, strict=True):
            yield Fitted(
                [Probe(*self.scales[design], tensors[number]) for number in numbers],
                [penalties[number] for number in numbers],
                all(converged[number] for number in numbers),
                sent,
            )


def _fit_linear(batch: _Batch) -> Iterator[Fitted]:
    options = batch.options
    features, problems = batch.on(Part.TRAIN)
    held, held_problems = batch.on(Part.VALIDATION)
    training = LogisticProblems(features, problems)
    chosen, _ = fit_path(
        training,
        held,
        [problem.labels for problem in held_problems],
        options.penalties,
        tolerance=PATH_TOLERANCE * options.tolerance,
        max_iterations=options.max_iterations,
    )
    known = training.directions
    del training, features, held
    fit = LogisticProblems(*batch.on(Part.TRAIN, Part.VALIDATION), like=known).solve(
        chosen.penalty, chosen, options.tolerance, options.max_iterations
    )
    sizes = [len(problems[number].labels) for number in batch.coded]
    return batch.fitted(
        [{"weight": w.cpu(), "bias": b.cpu()} for w, b in zip(fit.weights, fit.intercepts, strict=True)],
        fit.penalty.tolist(),
        fit.converged.tolist(),
        batch.codes(linear_fit(chosen.penalty[batch.coded], sizes)),
    )


def _fit_mlp(batch: _Batch) -> Iterator[Fitted]:
    features, problems = batch.on(Part.TRAIN)
    held, held_problems = batch.on(Part.VALIDATION)
    held_labels = [problem.labels for problem in held_problems]
    size = {
        "width": batch.options.hidden_width,
        "max_passes": batch.options.max_passes,
        "patience": batch.options.patience,
    }

    def part(parts: Sequence[Tensor], first: Sequence[Problem], owners: Sequence[int]) -> MlpFit:
        numbers = [batch.coded[owner] for owner in owners]
        held_of = {p.design: problems[number].design for p, number in zip(first, numbers, strict=True)}
        return fit_mlp(
            parts,
            first,
            [held[held_of[place]] for place in range(len(parts))],
            [held_labels[number] for number in numbers],
            seeds=[batch.seeds[number] for number in numbers],
            **size,
        )

    fit = fit_mlp(features, problems, held, held_labels, seeds=batch.seeds, **size)
    layers = zip(fit.w1, fit.b1, fit.w2, fit.b2, strict=True)
    names = ("hidden_weight", "hidden_bias", "weight", "bias")
    return batch.fitted(
        [{name: tensor.cpu() for name, tensor in zip(names, four, strict=True)} for four in layers],
        [None] * len(problems),
        fit.converged.tolist(),
        batch.codes(part),
    )


def _sending_order(prepared: Prepared, seed: int) -> Codes:
    """Training words in a random order of whole sentences."""
    train = prepared.at(Part.TRAIN)
    groups = prepared.words.group[train]
    distinct, which = np.unique(groups, return_inverse=True)
    keys = np.random.default_rng([seed, len(distinct)]).random(len(distinct))
    return train[np.lexsort((np.arange(len(train)), which, keys[which]))]
