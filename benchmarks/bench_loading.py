"""Opening a checkpoint and one forward pass with all hidden states, against the plain loop over transformers.

    python benchmarks/bench_loading.py

Random networks of the shapes of Pythia-14m and Pythia-70m, written to a temporary folder; the file lies in the page
cache. Both end with the same table: hidden states ``[L+1, tokens, D]`` of every token. The plain loop is the one that
a user writes: ``from_pretrained``, batches of 32, ``output_hidden_states=True``; it computes logits, as a causal
language model does, where ours leaves the pass after the last block when nobody asks for them (a second row has
somebody ask). From the second checkpoint of a run on, only weights are exchanged in a network that is kept (the last
row). Ours also looks for missing, misplaced and non-finite weights, and owns them: a file that is written
again does not change them.

Floor: the bytes of the file at the speed of reading it, and the products of the pass at the speed of a large product of
the same width, both measured in the same run.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "2"

import numpy as np
import torch
from common import alternating, result, save, versions
from threadpoolctl import threadpool_limits

from trace_offline import EvaluationSet, discover
from trace_offline.activations.forward import run_pass
from trace_offline.activations.hidden_table import HiddenStateTable
from trace_offline.checkpoints.loading import ModelCache, load_model
from trace_offline.recording import save_checkpoint, save_evaluation_set

THREADS = 2
ROUNDS = 3
ROWS, LENGTH = 64, 64
VOCABULARY = 50304
SHAPES = {"Pythia-14m": (128, 6, 4, 512), "Pythia-70m": (512, 6, 8, 2048)}
PEER = "transformers, from_pretrained and output_hidden_states"


def network(shape: tuple[int, int, int, int]) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    width, layers, heads, inner = shape
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


class AskForLogits:
    """Somebody who wants logits, and does nothing with them."""

    needs_hidden, needs_logits = False, True

    def update(self, batch: Any) -> None:
        """Look whether they are there."""
        assert batch.logits is not None

    def finish(self) -> None:
        """Nothing."""


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_pass(model: Any, tokens: Any) -> torch.Tensor:
    parts: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for start in range(0, ROWS, 32):
            rows = slice(start, start + 32)
            output = model(
                input_ids=tokens.input_ids[rows], attention_mask=tokens.attention_mask[rows], output_hidden_states=True
            )
            parts.append([state.flatten(0, 1) for state in output.hidden_states])
    return torch.stack([torch.cat(layer) for layer in zip(*parts, strict=True)])


def our_pass(model: Any, evaluation: EvaluationSet, logits: bool) -> torch.Tensor:
    row, position = (part.reshape(-1) for part in np.indices((ROWS, LENGTH)))
    table = HiddenStateTable(row, position, position + 1)
    asked: dict[str, Any] = {"table": table} | ({"logits": AskForLogits()} if logits else {})
    assert run_pass(model, evaluation, asked) == {}
    return table.finish()


def flops(shape: tuple[int, int, int, int], head: bool) -> float:
    """Multiplications and additions of the products of one pass over all tokens."""
    width, layers, _, inner = shape
    block = 4 * width * width + 2 * width * inner + 2 * LENGTH * width
    return 2.0 * ROWS * LENGTH * (layers * block + (VOCABULARY * width if head else 0))


def seconds_per_flop(width: int) -> float:
    """Of a product of this inner width, the other two sides large."""
    left, right = torch.randn(ROWS * LENGTH, width), torch.randn(width, 4096)
    times = alternating({"product": lambda: left @ right}, repeats=9)["product"]
    return statistics.median(times) / (2.0 * left.shape[0] * width * right.shape[1])


def seconds_to_read(path: Path) -> float:
    buffer = bytearray(1 << 24)

    def read() -> None:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    return statistics.median(alternating({"read": read}, repeats=5)["read"])


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    save_checkpoint(network(shape), folder / "run", 0)
    save_evaluation_set(folder / "set", torch.randint(4, VOCABULARY, (ROWS, LENGTH)), name="random")
    evaluation = EvaluationSet.load(folder / "set")
    tokens = evaluation.tokens(0, ROWS)
    checkpoint = discover(str(folder / "run"))[0]
    place = Path(checkpoint.location)
    theirs, ours = plain_pass(opened(place), tokens), our_pass(load_model(checkpoint), evaluation, False)
    # the last of theirs is behind the final norm
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-4, atol=1e-5)
    cache = ModelCache()
    load_model(checkpoint, cache=cache)
    bodies = {
        "plain": lambda: plain_pass(opened(place), tokens),
        "hidden": lambda: our_pass(load_model(checkpoint), evaluation, False),
        "logits": lambda: our_pass(load_model(checkpoint), evaluation, True),
        "open plain": lambda: opened(place),
        "open": lambda: load_model(checkpoint),
        "open next": lambda: load_model(checkpoint, cache=cache),
    }
    times = {case: statistics.median(found) for case, found in alternating(bodies, repeats=ROUNDS).items()}
    assert cache.hits == ROUNDS + 1
    files = list(place.glob("*.safetensors"))
    reading = sum(seconds_to_read(path) for path in files)
    speed = seconds_per_flop(shape[0])
    size = f"{name} shape"
    tokens_text = f"{ROWS * LENGTH:,} tokens"
    cases = (
        (f"{size}: opened, hidden states of {tokens_text}", "hidden", "plain", False),
        (f"{size}: the same with logits", "logits", "plain", True),
        (f"{size}: opened", "open", "open plain", None),
        (f"{size}: opened, the next of a run", "open next", "open plain", None),
    )
    rows = []
    for case, mine, peer, head in cases:
        floor = reading + (0.0 if head is None else flops(shape, head) * speed)
        rows.append(
            result(
                case, times[mine], "s", peer=times[peer], peer_name=PEER, floor=floor, ratio=times[peer] / times[mine],
                over_floor=times[mine] / floor, n=ROUNDS, threads=THREADS, gigaflops=1e-9 / speed,
                bytes=sum(path.stat().st_size for path in files), versions=versions("torch", "transformers"),
            )
        )  # fmt: skip
    return rows


def main() -> int:
    torch.set_num_threads(THREADS)
    rows = []
    with threadpool_limits(THREADS):
        for name in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(name, Path(folder))
    save("loading", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
