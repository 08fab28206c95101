"""``training_text.safetensors``: what the training text says about an evaluation set, as far as its rows are concerned.

Optional. ``seen [N]``: the row, special tokens at its ends aside, is one of the training texts. ``matched [N, T]``:
length of the longest n-gram that ends with the token, lies in its row and occurs within one training text.
``context_1``, ``context_2 [N, T]`` and for each number of context tokens k ``parent_k``, ``start_k``, ``token_k``,
``count_k``: the contexts of the rows and what followed them in training (see ``estimators.ngram_counts``).
``size [2]``: training texts and their tokens. All of it is part of the set's hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trace_offline.core.errors import EvaluationSetError
from trace_offline.estimators.ngram_counts import Level, match_training_text

TRAINING_TEXT = "training_text.safetensors"
ORDER = 3
"""n of the longest n-gram whose continuations are kept."""

_PARTS = ("parent", "start", "token", "count")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingText:
    """The content of the file. ``context [ORDER, N, T]``: before each token, index into ``levels[k]``, −1 if none."""

    n_texts: int
    n_tokens: int
    seen: npt.NDArray[np.bool_]
    matched: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    levels: tuple[Level, ...]

    def first(self, n: int) -> TrainingText:
        """What it says about the first ``n`` rows."""
        return replace(self, seen=self.seen[:n], matched=self.matched[:n], context=self.context[:, :n])

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """By name, in the order in which they are hashed."""
        found: dict[str, npt.NDArray[Any]] = {
            "size": np.asarray([self.n_texts, self.n_tokens], np.int64),
            "seen": self.seen.astype(np.uint8),
            "matched": self.matched,
        }
        for k, level in enumerate(self.levels):
            if k:
                found[f"context_{k}"] = self.context[k]
            found |= {f"{part}_{k}": getattr(level, part) for part in _PARTS}
        return {name: np.ascontiguousarray(values) for name, values in found.items()}


def compare(
    input_ids: Integers,
    attention_mask: npt.NDArray[np.integer],
    special_token_ids: Sequence[int],
    texts: Sequence[npt.NDArray[np.integer]],
    pieces: Iterable[npt.NDArray[np.integer]] | None = None,
) -> TrainingText:
    """Compare the rows of a set with training texts, given as token ids framed as the rows are.

    ``pieces``: the texts as rows would hold them, when long ones are cut; default: the texts themselves.
    Raises EvaluationSetError when there is no text.
    """
    whole = [np.asarray(text, np.int64) for text in texts if len(text)]
    if not whole:
        raise EvaluationSetError("the training text is empty: expected at least one text with a token.")
    mask = attention_mask.astype(bool)
    rows = [ids[kept].astype(np.int64) for ids, kept in zip(input_ids, mask, strict=True)]
    found = match_training_text(rows, whole, ORDER)
    special = np.asarray(sorted(special_token_ids), np.int64)
    known = {_content(np.asarray(piece, np.int64), special) for piece in (whole if pieces is None else pieces)}
    contents = [_content(row, special) for row in rows]
    matched = np.zeros(mask.shape, np.int32)
    matched[mask] = found.matched
    context = np.full((ORDER, *mask.shape), -1, np.int32)
    context[0] = 0
    for k in range(1, ORDER):
        context[k][mask] = found.context[k]
    return TrainingText(
        n_texts=len(whole),
        n_tokens=sum(len(text) for text in whole),
        seen=np.asarray([bool(content) and content in known for content in contents]),
        matched=matched,
        context=context,
        levels=found.levels,
    )


def read(folder: Path, n: int, t: int) -> TrainingText | None:
    """The file of an evaluation set of N rows and T positions, or None when it has none.

    Raises EvaluationSetError when the file is damaged or does not fit the set.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / TRAINING_TEXT
    if not path.exists():
        return None
    again = "Build the evaluation set anew."
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EvaluationSetError(f"{path}: damaged or incomplete ({error}). {again}") from error
    names = {"size", "seen", "matched"} | {f"{part}_{k}" for part in _PARTS for k in range(ORDER)}
    names |= {f"context_{k}" for k in range(1, ORDER)}
    if missing := sorted(names - set(tensors)):
        raise EvaluationSetError(f"{path}: {', '.join(missing)} not found. {again}")
    expected: dict[str, tuple[int, ...]] = {"size": (2,), "seen": (n,), "matched": (n, t)}
    expected |= {f"context_{k}": (n, t) for k in range(1, ORDER)}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise EvaluationSetError(
                f"{path}: {name} must have the shape {list(shape)} of the set; found {list(tensors[name].shape)}. "
                f"{again}"
            )
    levels = tuple(Level(*(tensors[f"{part}_{k}"].astype(np.int64) for part in _PARTS)) for k in range(ORDER))
    context = np.stack([np.zeros((n, t), np.int32), *(tensors[f"context_{k}"] for k in range(1, ORDER))])
    for k, level in enumerate(levels):
        fits = (
            len(level.start) == len(level) + 1
            and len(level.token) == len(level.count) == int(level.start[-1])
            and bool((np.diff(level.start) >= 0).all())
            and int(context[k].max(initial=-1)) < len(level)
            and (k == 0 or int(level.parent.max(initial=-1)) < len(levels[k - 1]))
        )
        if not fits:
            raise EvaluationSetError(f"{path}: the contexts of {k} tokens contradict each other. {again}")
    return TrainingText(
        n_texts=int(tensors["size"][0]),
        n_tokens=int(tensors["size"][1]),
        seen=tensors["seen"].astype(bool),
        matched=tensors["matched"],
        context=context,
        levels=levels,
    )


def _content(tokens: Integers, special: Integers) -> bytes:
    """The tokens without special ones at either end, as something that can be looked up."""
    ordinary = np.flatnonzero(~np.isin(tokens, special))
    if not len(ordinary):
        return b""
    return np.ascontiguousarray(tokens[ordinary[0] : ordinary[-1] + 1], "<i8").tobytes()
