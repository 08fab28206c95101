"""One forward pass over the evaluation set, shared by every collector.

Numbers must not depend on who else listens: how rows are cut into batches follows from the network and the evaluation
set (on a GPU from its free memory, too), and hidden states are always copied off the same computation, whether or not
the output head runs after it.

Shape letters: B sequences of a batch, T positions, D width, V output classes, L blocks, N rows of the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trace_offline.activations.batch import IGNORED, Collector, ForwardBatch
from trace_offline.activations.batch_size import PassOutOfMemory, PassShape, attention_heads, rows_that_fit, too_small
from trace_offline.activations.memory import free_memory, ran_out
from trace_offline.activations.model import ModelView, logits_of
from trace_offline.activations.precision import products
from trace_offline.core.errors import CheckpointError, EvaluationSetError, NotApplicable

BATCH_TOKENS = 8192
MEMORY_FLOATS = 64 * 2**20


class Tokens(Protocol):
    """Rows of an evaluation set: ``input_ids``, ``attention_mask`` (bool), ``targets``; all ``[B, T]``."""

    @property
    def input_ids(self) -> Tensor:
        """``int64 [B, T]``."""

    @property
    def attention_mask(self) -> Tensor:
        """``bool [B, T]``, False at padding."""

    @property
    def targets(self) -> Tensor:
        """``int64 [B, T]``: compared with the prediction at the same place; −100 where nothing counts."""


class TokenSource(Protocol):
    """What the pass needs of an evaluation set."""

    @property
    def n_examples(self) -> int:
        """Rows N."""

    @property
    def max_length(self) -> int:
        """Positions T of the longest row."""

    def tokens(self, start: int, stop: int) -> Tokens:
        """Rows ``start`` to ``stop`` (exclusive)."""


@dataclass(frozen=True)
class Anatomy:
    """What one row through the network shows: widths, and whether its blocks can be listened to.

    ``obstacle``: why hidden states cannot be had, or None.
    """

    classes: int | None
    width: int | None
    obstacle: str | None

    def rows_per_batch(self, max_length: int, n_layers: int, batch_tokens: int, memory_floats: int) -> int:
        """B with ``B·T`` ≤ ``batch_tokens`` and ``B·T·max(V, (L+1)·D)`` ≤ ``memory_floats``; at least 1."""
        per_token = max(self.classes or 1, (n_layers + 1) * (self.width or 1))
        tokens = min(batch_tokens, memory_floats // per_token)
        return max(1, tokens // max(1, max_length))


class _Reached(Exception):
    """Thrown after the last block to leave the forward pass before the final norm and the output head."""


def run_pass(
    model: ModelView,
    evaluation: TokenSource,
    collectors: Mapping[str, Collector],
    *,
    first_row: int = 0,
    rows_at_most: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    memory_floats: int = MEMORY_FLOATS,
    on_error: Callable[[str, BaseException], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, BaseException]:
    """Run the network once over the set; every collector sees every batch, in the order of the rows.

    ``first_row``: the rows before it are left out. Each batch is cut to its longest sequence. A batch holds at most
    ``batch_tokens`` positions and ``memory_floats`` values of logits or hidden states (256 MB by default), whichever is
    less, always the same for the same network and set; on a GPU, what fits into its free memory (``batch_size``). The
    output head is skipped when no collector needs logits, the network when none needs it.
    Values that are not finite are handed on as they are.

    A collector that raises, ``SystemExit`` included, is dropped while the others go on; one that needs hidden states or
    logits the network cannot give is dropped with NotApplicable. The exceptions are returned by name (``on_error``
    hears of each at once); the caller calls ``finish`` of the rest. ``on_batch`` is told rows done and rows in all.

    When a GPU runs out of memory, PassOutOfMemory is raised at once: the caller begins anew with other collectors and
    ``rows_at_most`` half of its ``rows``. With that given, and where a single row was too much, there is no second
    chance: a collector that runs out of memory is dropped with DeviceMemoryError, the network raises it.

    Raises EvaluationSetError when the network cannot take the tokens (an id or a position it has no embedding for),
    CheckpointError when it does not take ``input_ids`` and ``attention_mask``.
    """
    dropped: dict[str, BaseException] = {}
    active = dict(collectors)

    def drop(name: str, error: BaseException) -> None:
        del active[name]
        dropped[name] = error
        if on_error is not None:
            on_error(name, error)

    n_rows = evaluation.n_examples
    rows = n_rows or 1
    obstacles: tuple[str | None, str | None] = (None, None)
    if n_rows and any(item.needs_hidden or item.needs_logits for item in active.values()):
        try:
            anatomy = examine(model, evaluation)
        except RuntimeError as full:
            if not ran_out(full):
                raise
            raise too_small("one sequence", full) from None
        rows = anatomy.rows_per_batch(evaluation.max_length, model.n_layers or 0, batch_tokens, memory_floats)
        free = free_memory(torch.device(model.device)).device
        if free is not None:
            rows = rows_that_fit(_shape(model, anatomy, evaluation), free)
        headless = f"{type(model.module).__name__} has no output head: it returns no logits"
        obstacles = (anatomy.obstacle, headless if anatomy.classes is None else None)
    elif n_rows:
        rows = max(1, batch_tokens // max(1, evaluation.max_length))
    for name, item in list(active.items()):
        for needed, obstacle in zip((item.needs_hidden, item.needs_logits), obstacles, strict=True):
            if needed and obstacle is not None:
                drop(name, NotApplicable(f"not applicable because {obstacle}"))
                break

    rows = min(rows, rows_at_most or rows, max(1, n_rows - first_row))
    again = rows_at_most is None and rows > 1
    for start in range(first_row, n_rows, rows):
        if not active:
            break
        stop = min(start + rows, n_rows)
        try:
            batch = _forward(model, evaluation, start, stop, list(active.values()))
        except RuntimeError as full:
            if not ran_out(full):
                raise
            if again:
                raise PassOutOfMemory(rows) from None
            raise too_small(f"the forward pass of {stop - start} sequences", full) from None
        for name, error in hand_out(batch, active):
            if ran_out(error):
                if again:
                    raise PassOutOfMemory(rows)
                error = too_small(f"what is collected of {stop - start} sequences", error)
            drop(name, error)
        del batch  # or it would take its memory beside the next one
        if on_batch is not None:
            on_batch(stop, n_rows)
    return dropped


def _shape(model: ModelView, anatomy: Anatomy, evaluation: TokenSource) -> PassShape:
    # Where blocks are not known, the widest matrix is a guess on the safe side.
    width = anatomy.width or max((p.shape[-1] for p in model.module.parameters() if p.dim() > 1), default=1)
    return PassShape(
        layers=model.n_layers or 0,
        width=width,
        classes=anatomy.classes or 0,
        heads=attention_heads(getattr(model.module, "config", None), width),
        itemsize=next((p.element_size() for p in model.module.parameters() if p.is_floating_point()), 4),
        length=evaluation.max_length,
    )


def hand_out(batch: ForwardBatch, collectors: Mapping[str, Collector]) -> list[tuple[str, BaseException]]:
    """Show a batch to every collector; the names of those that raised, with what they raised.

    Only a user's interrupt goes on its way: a plug-in that calls ``sys.exit`` must not end the run.
    """
    raised: list[tuple[str, BaseException]] = []
    for name, item in collectors.items():
        try:
            with torch.no_grad():
                item.update(batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raised.append((name, error))
    return raised


def trimmed(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """``input_ids, attention_mask, targets`` without the columns at the right end that are padding in every row."""
    used = (tokens.attention_mask.bool() | (tokens.targets != IGNORED)).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return tokens.input_ids[:, :length], tokens.attention_mask[:, :length].bool(), tokens.targets[:, :length]


def examine(model: ModelView, evaluation: TokenSource) -> Anatomy:
    """Send the first row through the whole network and look: V, D, and whether each block runs once and in order."""
    input_ids, attention_mask, _ = trimmed(evaluation.tokens(0, 1))
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    with torch.no_grad(), _listen(model.blocks or (), stop_after_last=False) as heard:
        output = _call(model, input_ids, attention_mask)
    logits = logits_of(output)
    classes = None if logits is None or logits.dim() != 3 else logits.shape[-1]
    if model.blocks is None:
        return Anatomy(
            classes,
            None,
            f"the blocks of {type(model.module).__name__} are not known; name them with --blocks, for example "
            "--blocks 'layers.*'",
        )
    shape = (*input_ids.shape,)
    if heard.order != list(range(len(model.blocks))):
        problem = f"its blocks do not run once each and in order (order seen: {heard.order[:12]})"
    elif any(state is None or state.dim() != 3 or state.shape[:2] != shape for state in heard.states):
        problem = "a block's input or output is not a tensor [batch, position, width]"
    elif len({state.shape[-1] for state in heard.states if state is not None}) != 1:
        problem = "its blocks differ in width"
    else:
        state = heard.states[0]
        return Anatomy(classes, None if state is None else state.shape[-1], None)
    return Anatomy(classes, None, f"{type(model.module).__name__} has no hidden states of layers 0…L: {problem}")


def _forward(
    model: ModelView, evaluation: TokenSource, start: int, stop: int, collectors: list[Collector]
) -> ForwardBatch:
    input_ids, attention_mask, targets = (part.to(model.device) for part in trimmed(evaluation.tokens(start, stop)))
    needs_hidden = any(item.needs_hidden for item in collectors)
    needs_logits = any(item.needs_logits for item in collectors)
    hidden: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None
    # no_grad rather than inference_mode: tables a network caches on its way (rotary angles) would be inference
    # tensors for good, and curvature could not differentiate through them afterwards
    with torch.no_grad():
        if needs_hidden and model.blocks is not None:
            with _listen(model.blocks, stop_after_last=not needs_logits) as heard:
                output = _call(model, input_ids, attention_mask)
            hidden = tuple(state for state in heard.states if state is not None)
        elif needs_logits:
            output = _call(model, input_ids, attention_mask)
        if needs_logits:
            logits = logits_of(output)
    return ForwardBatch(
        examples=torch.arange(start, stop, device=model.device),
        input_ids=input_ids,
        attention_mask=attention_mask,
        targets=targets,
        hidden=hidden,
        logits=logits,
    )


def _call(model: ModelView, input_ids: Tensor, attention_mask: Tensor) -> object:
    try:
        with products(model.dtype):
            return model.module(input_ids=input_ids, attention_mask=attention_mask)
    except _Reached:
        return None
    except IndexError as error:
        raise EvaluationSetError(
            f"{type(model.module).__name__} has no embedding for a token or a position of the evaluation set: it holds "
            f"token ids up to {int(input_ids.max())} and {input_ids.shape[1]} positions ({error}). Build the "
            "evaluation set with this model's own tokenizer and within its context length."
        ) from error
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise CheckpointError(
            f"{type(model.module).__name__} cannot be called as model(input_ids=…, attention_mask=…): {error}. A model "
            "factory must return a module that takes these two and returns logits, or an object with .logits."
        ) from error


class _Heard:
    """Layers 0…L of one batch, copied as they go by, and the order in which the blocks spoke."""

    def __init__(self, n_blocks: int) -> None:
        self.states: list[Tensor | None] = [None] * (n_blocks + 1)
        self.order: list[int] = []


@contextmanager
def _listen(blocks: tuple[nn.Module, ...], *, stop_after_last: bool) -> Iterator[_Heard]:
    """Hooks on the blocks for one forward pass; with ``stop_after_last`` the pass ends after the last block."""
    heard = _Heard(len(blocks))

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *([kwargs["hidden_states"]] if "hidden_states" in kwargs else []), *kwargs.values()]
        heard.states[0] = _copy(next((item for item in given if isinstance(item, Tensor)), None))

    def after(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            heard.order.append(index)
            first = output[0] if isinstance(output, tuple | list) and output else output
            heard.states[index + 1] = _copy(first)
            if stop_after_last and index + 1 == len(blocks):
                raise _Reached

        return hook

    handles = [block.register_forward_hook(after(index)) for index, block in enumerate(blocks)]
    if blocks:
        handles.append(blocks[0].register_forward_pre_hook(before_first, with_kwargs=True))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _copy(state: object) -> Tensor | None:
    """A copy, because a network may go on to change its residual stream in place."""
    return state.detach().clone() if isinstance(state, Tensor) and state.is_floating_point() else None
