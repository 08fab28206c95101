"""The price of watching: the five default analyzers on a checkpoint of TRACE's size, in units of its training steps.

    python benchmarks/bench_watching.py        with default parameters, one round, a minute or two
    python benchmarks/bench_watching.py all    both cases, two rounds, ten minutes of one core

TRACE (arXiv 2507.03668) measures while it trains; one of its tracked steps takes 345 Hessian-vector products, each of
which builds the gradient anew: 180 of the whole model (three searches for eigenvalues), 71 of the feed-forward
weights, 48 of the attention, 46 of the norms. Part of each of these counts is executed here (``executed``), by code of
our own and without the search around it, and its time scaled to the whole; it is not TRACE's program. Ours is
everything from the checkpoint on disk to the numbers in the store: loading, one forward pass, five analyzers with
standard errors, writing. The floor is what its products would cost at two of PyTorch's own gradients each.

The model: two layers, d = 96, three heads, vocabulary 6,463; batches of 128 sequences of 16 tokens, packed, no padding;
a training step is forward, backward and AdamW on one of them. One thread and the processor's seconds for everything.
The Hessian is taken once as by default, on 16 of the 128 sequences, and once on all 128, as TRACE does.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import alternating, load, result, save, versions
from networks import Training, gpt_neox, loss_of, packed_rows
from threadpoolctl import threadpool_limits
from torch import Tensor

from trace_offline import Store, analyze
from trace_offline.recording import save_checkpoint, save_evaluation_set

VOCABULARY, LENGTH, BATCH = 6463, 16, 128
TRAINED = 40
STEPS = 6
ROUNDS = 2
EXECUTED = 1 / 6
THREADS = 1
# Products of one tracked step of TRACE: through which parameters (part of their names), and how many.
TRACE = (("", 180), (".mlp.", 71), (".attention.", 48), ("layernorm", 46))
CASES = {
    "five analyzers, Hessian of 16 sequences (default)": 16,
    "five analyzers, Hessian of all 128 sequences": BATCH,
}
LIMIT = 200.0


def rebuilt_products(network: torch.nn.Module, ids: Tensor, part: str, count: int, generator: torch.Generator) -> None:
    """``count`` products of the Hessian of one batch through some of the parameters, a new gradient for each."""
    chosen = [p for name, p in network.named_parameters() if part in name]
    for _ in range(count):
        vector = [torch.randn(p.shape, generator=generator) for p in chosen]
        gradient = torch.autograd.grad(loss_of(network, ids), chosen, create_graph=True)
        along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        torch.autograd.grad(along, chosen)


def main() -> int:
    torch.set_num_threads(THREADS)
    threadpool_limits(THREADS)
    text = list(packed_rows(VOCABULARY, LENGTH, 41 * BATCH))
    held, batch = text[:BATCH], torch.tensor([ids for ids, _ in text[:BATCH]])
    network = gpt_neox(VOCABULARY, 96, 2, 3, LENGTH)
    train = Training(network, torch.tensor([ids for ids, _ in text[BATCH:]]), BATCH)
    for _ in range(TRAINED):
        train()
    frozen = gpt_neox(VOCABULARY, 96, 2, 3, LENGTH)
    frozen.load_state_dict(network.state_dict())
    generator = torch.Generator().manual_seed(0)
    cases, rounds = (dict(list(CASES.items())[:1]), 1) if sys.argv[1:] != ["all"] else (CASES, ROUNDS)
    part_of = EXECUTED / ROUNDS
    stores: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(frozen, folder / "run", TRAINED)
        labels = [(row, *label) for row, (_, found) in enumerate(held) for label in found]
        save_evaluation_set(folder / "set", batch, annotations=labels, split=[row % 5 >= 3 for row in range(BATCH)])

        def watch(case: str) -> None:
            stores[case] = folder / f"{len(list(folder.glob('*.duckdb')))}.duckdb"
            done = analyze(
                folder / "run", folder / "set", stores[case], executor="inline", device="cpu",
                params={"hessian": {"max_sequences": CASES[case]}},
            )  # fmt: skip
            if done.ok != 5:
                raise RuntimeError(f"only {done.ok} of 5 analyses: {done.problems}")
            threadpool_limits(THREADS)
            torch.set_num_threads(THREADS)

        def recipe() -> None:
            for part, count in TRACE:
                rebuilt_products(frozen, batch, part, round(count * part_of), generator)

        def gradients(sequences: int) -> None:
            for _ in range(STEPS):
                torch.autograd.grad(loss_of(frozen, batch[:sequences]), list(frozen.parameters()))

        times = alternating(
            {
                "step": lambda: [train() for _ in range(STEPS)],
                **{f"gradient {number}": lambda number=number: gradients(number) for number in cases.values()},
                **{case: lambda case=case: watch(case) for case in cases},
                "recipe": recipe,
            },
            rounds,
            warmup=0,
            clock=time.process_time,
        )
        step = statistics.median(times["step"]) / STEPS
        share = sum(round(count * part_of) for _, count in TRACE) / sum(count for _, count in TRACE)
        peer = statistics.median(times["recipe"]) / step / share
        rows = []
        for case, sequences in cases.items():
            store = Store.open(stores[case])
            products = store.scalar("select value from history where metric = 'products'")
            numbers = store.scalar("select count(*) from history where value is not null")
            ours = statistics.median(times[case]) / step
            floor = 2 * products * statistics.median(times[f"gradient {sequences}"]) / STEPS / step
            rows.append(
                result(
                    case, ours, "training steps", limit=LIMIT, peer=peer, floor=floor, ratio=peer / ours,
                    peer_name="TRACE's 345 products, gradient rebuilt each time", products=products, numbers=numbers,
                    step_seconds=step, threads=THREADS, rounds=rounds, executed=share * rounds, trained=TRAINED,
                    versions=versions("torch", "transformers", "numpy"),
                )
            )  # fmt: skip
    rows += [old for old in load("watching") if old["case"] not in cases]
    save("watching", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
