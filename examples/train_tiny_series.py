"""Train a tiny GPT-NeoX on annotated synthetic sentences and keep what trace-offline needs to analyze it later.

    python -m trace_offline.corpus --sentences 100000 --seed 0 --output corpus.jsonl
    python examples/train_tiny_series.py corpus.jsonl --output data

This is an ordinary training script. Two calls are all it does for the analysis: ``save_evaluation_set`` once, and
``save_checkpoint`` at steps 0, 1, 2, 4, 8, … to the last. Nothing is measured while the model trains.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from trace_offline.recording import save_checkpoint, save_evaluation_set

CONTEXT = 32  # tokens, BOS and EOS included
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]
PAD, UNK, BOS, EOS = range(4)


def read_corpus(path: Path, held_out: int) -> tuple[list[dict], list[dict]]:
    """The first ``held_out`` sentences for evaluation; of the rest, those that do not repeat one of them."""
    with path.open(encoding="utf-8") as file:
        sentences = [record for record in map(json.loads, file) if len(record["words"]) <= CONTEXT - 2]
    evaluation = sentences[:held_out]
    seen = {tuple(record["words"]) for record in evaluation}
    return evaluation, [record for record in sentences[held_out:] if tuple(record["words"]) not in seen]


def make_tokenizer(sentences: list[dict]) -> PreTrainedTokenizerFast:
    """One token per word of the training sentences, the most frequent first."""
    counts = Counter(word for record in sentences for word in record["words"])
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: index for index, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
    )


def encode(sentences: list[dict], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids, padded on the right: int64 [sentence, CONTEXT]."""
    texts = [" ".join(record["words"]) for record in sentences]
    return tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]


def annotations(sentences: list[dict], ids: torch.Tensor):
    """(row, task, start, end, label) for the part of speech of every known word and the role of every argument."""
    for row, record in enumerate(sentences):
        for position, (pos, role) in enumerate(zip(record["pos"], record["roles"], strict=True), start=1):  # after BOS
            if ids[row, position] == UNK:
                continue
            yield row, "pos", position, position + 1, pos
            if role is not None:
                yield row, "role", position, position + 1, role


def next_token_loss(model: GPTNeoXForCausalLM, ids: torch.Tensor, ignored: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of all next tokens but the ignored ones, and their number."""
    ids = ids[:, : int((ids != PAD).sum(1).max())]
    logits = model(input_ids=ids[:, :-1]).logits
    targets = ids[:, 1:].clone()
    targets[torch.isin(targets, torch.tensor(ignored))] = -100
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


@torch.no_grad()
def held_out_loss(model: GPTNeoXForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss per word in nats; special tokens do not count as targets."""
    model.eval()
    sums = [next_token_loss(model, batch, ignored=(PAD, UNK, BOS, EOS)) for batch in ids.split(250)]
    model.train()
    return sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)


def unigram_entropy(ids: torch.Tensor) -> float:
    """Entropy in nats of the words of ``ids``: the loss of the best model that ignores the context."""
    counts = torch.bincount(ids[ids > EOS]).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 1 %, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(given: argparse.Namespace) -> dict:
    torch.manual_seed(given.seed)
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()  # one line per checkpoint is enough
    started = time.perf_counter()

    evaluation, training = read_corpus(given.corpus, given.held_out)
    tokenizer = make_tokenizer(training)
    held_out, data = encode(evaluation, tokenizer), encode(training, tokenizer)
    save_evaluation_set(
        given.output / "tiny_evaluation",
        held_out,
        held_out != PAD,
        annotations=annotations(evaluation, held_out),
        name="tiny_evaluation",
        special_token_ids=(PAD, UNK, BOS, EOS),
        tokenizer=tokenizer,
        split=[int(row % 5 >= 3) for row in range(len(evaluation))],  # fit probes on 3 of 5 sentences, score on 2
        source="synthetic sentences of trace_offline.corpus, the first of the corpus file",
        licence="CC0-1.0",
    )

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        intermediate_size=4 * given.width,
        max_position_embeddings=CONTEXT,
        rotary_pct=0.5,
        use_parallel_residual=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, betas=(0.9, 0.95), weight_decay=0.01)
    order = torch.Generator().manual_seed(given.seed)
    keep = {0, given.steps} | {2**k for k in range(given.steps.bit_length()) if 2**k <= given.steps}
    history, tokens_seen, queue = [], 0, torch.empty(0, dtype=torch.long)

    for step in range(given.steps + 1):
        if step in keep:
            save_checkpoint(model, given.output / "tiny_series", step, tokenizer=tokenizer, tokens_seen=tokens_seen)
            history.append({"step": step, "tokens_seen": tokens_seen, "loss": held_out_loss(model, held_out)})
            seconds = time.perf_counter() - started
            print(f"step {step:>5}  held-out loss {history[-1]['loss']:.3f}  {seconds:6.1f} s", flush=True)
        if step == given.steps:
            break
        if len(queue) < given.batch:
            queue = torch.cat([queue, torch.randperm(len(data), generator=order)])
        chosen, queue = queue[: given.batch], queue[given.batch :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, given.steps, given.rate)
        loss, count = next_token_loss(model, data[chosen], ignored=(PAD,))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens_seen += count

    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}",
        "seconds": round(time.perf_counter() - started, 1),
        "arguments": {k: v for k, v in vars(given).items() if k not in ("corpus", "output")},
        "corpus_sha256": hashlib.sha256(given.corpus.read_bytes()).hexdigest(),
        "training_sentences": len(training),
        "evaluation_sentences": len(evaluation),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "unigram_entropy": unigram_entropy(held_out),
        "held_out": history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny GPT-NeoX and keep log-spaced checkpoints.")
    parser.add_argument("corpus", type=Path, help="JSONL file of trace_offline.corpus")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for the series and evaluation set")
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=64, help="sentences per step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=1000, help="sentences of the evaluation set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    log = train(given)
    (given.output / "training_log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
