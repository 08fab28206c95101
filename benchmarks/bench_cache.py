"""The activation cache against opening the network again: hidden states of 2,000 tokens, to the same bits."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import result, save, versions

from trace_offline import discover
from trace_offline.activations.hidden_table import HiddenStateTable
from trace_offline.analyzers._token_sample import sample_tokens
from trace_offline.checkpoints.fingerprint import with_fingerprint
from trace_offline.checkpoints.loading import load_model
from trace_offline.core.types import Checkpoint
from trace_offline.engine.cache import UnitActivations
from trace_offline.engine.unit import Unit, WorkSettings, file_stamps
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_checkpoint, save_evaluation_set

DATA = Path(__file__).parents[1] / "data"
TOKENS = 2000
ROUNDS = 5


def states(checkpoint: Checkpoint, evaluation: EvaluationSet, settings: WorkSettings) -> torch.Tensor:
    """What an analyzer of hidden states waits for: the network opened and run, or the cache read."""
    unit = Unit(checkpoint, (), settings, file_stamps(checkpoint))
    activations = UnitActivations.of(unit, "cpu")
    model = activations.model(lambda: load_model(checkpoint), hidden_only=True)
    sample = sample_tokens(evaluation, TOKENS, 0)
    table = HiddenStateTable(sample.rows, sample.positions, sample.positions + 1)
    assert activations.run_pass(model, evaluation, {"geometry/hidden": table}) == {}
    return table.finish()


def larger(folder: Path) -> tuple[Path, Path]:
    """A random GPT-NeoX of 6 blocks, width 256, vocabulary 8,192, and 128 rows of 64 tokens."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=64,
    )  # fmt: skip
    save_checkpoint(GPTNeoXForCausalLM(config), folder / "run", 0)
    save_evaluation_set(folder / "set", torch.randint(0, 8192, (128, 64)), name="random")
    return folder / "run", folder / "set"


def main() -> int:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        shipped = (DATA / "tiny_series", DATA / "tiny_evaluation")
        for name, (source, folder) in (
            ("shipped series, 4 blocks of width 48, 1,000 rows", shipped),
            ("random network, 6 blocks of width 256, 128 rows of 64", larger(Path(temporary) / "larger")),
        ):
            checkpoint = with_fingerprint(discover(str(source))[-1])
            evaluation = EvaluationSet.load(folder)
            off = WorkSettings(str(folder), evaluation.hash, "cpu", "float32", 0, 1)
            cache = Path(temporary) / name[:6].strip()
            on = dataclasses.replace(off, cache=str(cache), cache_bytes=10**9)
            first = states(checkpoint, evaluation, on)
            seconds: dict[str, list[float]] = {"on": [], "off": []}
            for _ in range(ROUNDS):
                for which, settings in (("on", on), ("off", off)):
                    started = time.process_time()
                    found = states(checkpoint, evaluation, settings)
                    seconds[which].append(time.process_time() - started)
                    assert torch.equal(found, first)
            ours, peer = (statistics.median(seconds[which]) for which in ("on", "off"))
            rows.append(
                result(
                    f"hidden states of {TOKENS:,} tokens from the cache: {name}", ours, "CPU s", peer=peer,
                    peer_name="the network opened and run", ratio=peer / ours,
                    cached_bytes=sum(path.stat().st_size for path in cache.glob("*.safetensors")),
                    versions=versions("torch", "transformers", "safetensors"),
                )
            )  # fmt: skip
    save("cache", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
