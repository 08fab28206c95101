"""Train the small decoders of the TRACE paper on annotated synthetic sentences and keep their checkpoints.

    python examples/trace_paper/train.py --output runs --layers 2 --seed 0

An ordinary training script: the only call it makes for the analysis is ``save_checkpoint``. Nothing is measured while
the model trains. Killed and started again, it goes on from its last checkpoint and ends with the same weights.

The corpus (25,000 sentences, the first 80 % to train on) is drawn once and is the same for every seed, as one corpus
file is in the paper: the runs differ in initialisation, order of sentences and dropout, and all are measured on the
same held-out sentences. Sentences and splits are kept as JSON lines beside the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from trace_offline.corpus import CorpusParams, LexiconParams, generate, write_jsonl
from trace_offline.recording import save_checkpoint

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)
STATE = "state.pt"
CORPUS = ("sentences", "longest", "train_share", "corpus_seed", "nouns", "verbs_per_frame", "adjectives", "adverbs")
CHECKPOINTS = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)
CHECKPOINTS_LATE = (2048, 2560, 3072, 3840)  # and the last step


@dataclass(frozen=True)
class Setting:
    """Everything that fixes a run. The defaults are the paper's (d 96, 3 heads, d_ff 384, 30 epochs of 157 steps).

    ``longest``: most words of a sentence; longer ones are not drawn. With a beginning and an end it fills the paper's
    16 positions. ``nouns`` and so on: lemmas, about as many as in the notebook of the paper's corpus.
    """

    layers: int = 2
    seed: int = 0
    sentences: int = 25_000
    longest: int = 14
    train_share: float = 0.8
    corpus_seed: int = 0
    nouns: int = 300
    verbs_per_frame: int = 12
    adjectives: int = 40
    adverbs: int = 25
    width: int = 96
    heads: int = 3
    inner: int = 384
    dropout: float = 0.1
    epochs: int = 30
    batch: int = 128
    rate: float = 1e-3
    warmup: int = 1000
    weight_decay: float = 0.01

    @property
    def name(self) -> str:
        """Name of the run: layers and seed."""
        return f"L{self.layers}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; the last batch of an epoch may be smaller."""
        return self.epochs * -(-round(self.sentences * self.train_share) // self.batch)

    def kept(self) -> tuple[int, ...]:
        """Steps whose weights are kept: doubling at first, then close together, then every few hundred."""
        return (*(s for s in CHECKPOINTS + CHECKPOINTS_LATE if s < self.steps), self.steps)


def write_corpus(folder: Path, setting: Setting) -> dict[str, Any]:
    """Draw the sentences into ``folder/train.jsonl`` and ``folder/held_out.jsonl``; a no-op when they are there.

    Held-out sentences that repeat a training sentence word by word are dropped, so that all of them are new.
    Raises SystemExit when the folder holds the corpus of another setting.
    """
    asked = {key: value for key, value in asdict(setting).items() if key in CORPUS}
    record = folder / "corpus.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if found["asked"] != asked:
            raise SystemExit(f"{folder} holds another corpus: {found['asked']}, asked for {asked}. Use another folder.")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    lexicon = LexiconParams(setting.nouns, setting.verbs_per_frame, setting.adjectives, setting.adverbs)
    stream = generate(setting.corpus_seed, CorpusParams(lexicon=lexicon))
    drawn = list(islice((s for s in stream if len(s.words) <= setting.longest), setting.sentences))
    first_held_out = round(setting.sentences * setting.train_share)
    train, rest = drawn[:first_held_out], drawn[first_held_out:]
    seen = {sentence.words for sentence in train}
    held_out = [sentence for sentence in rest if sentence.words not in seen]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "held_out.jsonl", held_out)
    tokenizer = make_tokenizer(folder)
    found = {
        "asked": asked,
        "train": len(train),
        "held_out": len(held_out),
        "held_out_dropped_as_repeats": len(rest) - len(held_out),
        "train_words": sum(len(sentence.words) for sentence in train),
        "vocabulary": len(tokenizer),
        "train_sha256": hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest(),
    }
    record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def read_words(path: Path) -> list[list[str]]:
    """The words of every sentence of a corpus file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["words"] for line in file]


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token per word of the training sentences, in alphabetical order: an id says nothing about frequency."""
    words = sorted({word for sentence in read_words(folder / "train.jsonl") for word in sentence})
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def encode(sentences: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids, padded on the right: int64 [sentence, longest]."""
    return tokenizer([" ".join(words) for words in sentences], padding=True, return_tensors="pt")["input_ids"]


def make_model(setting: Setting, vocabulary: int, positions: int) -> GPT2LMHeadModel:
    """A GPT-2 with a head of its own (the paper's model does not tie it to the embedding either)."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=setting.width,
            n_layer=setting.layers,
            n_head=setting.heads,
            n_inner=setting.inner,
            activation_function="gelu",
            resid_pdrop=setting.dropout,
            embd_pdrop=setting.dropout,
            attn_pdrop=setting.dropout,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def batch_of(step: int, data: torch.Tensor, setting: Setting) -> torch.Tensor:
    """The sentences of a step, int64 [B, T]: every epoch is a fresh order that only seed and epoch decide."""
    per_epoch = -(-len(data) // setting.batch)
    epoch, within = divmod(step, per_epoch)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1_000_003 * setting.seed + epoch))
    return data[order[within * setting.batch : (within + 1) * setting.batch]]


def backward(model: GPT2LMHeadModel, ids: torch.Tensor) -> tuple[float, int]:
    """Gradient of the mean cross-entropy of the next tokens (the end of the sentence counts); the loss in nats and n.

    The shorter and the longer half go through the model one after the other, each cut to its longest sentence: the
    same loss and gradient with half the padding.
    """
    lengths = (ids != PAD).sum(1)
    total = int((lengths - 1).sum())
    loss = 0.0
    for part in ids[lengths.argsort(stable=True)].chunk(2):
        part = part[:, : int((part != PAD).sum(1).max())]
        targets = torch.where(part[:, 1:] == PAD, -100, part[:, 1:])
        # Padding lies on the right, where a causal model never looks back from a token that counts.
        logits = model(input_ids=part[:, :-1], attention_mask=part[:, :-1] != PAD, use_cache=False).logits
        share = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / total
        share.backward()
        loss += float(share.detach())
    return loss, total


def train(folder: Path, setting: Setting, *, stop_after: int | None = None) -> dict[str, Any]:
    """Train one run into ``folder/<name>``; goes on where an interrupted run stopped; a no-op when it is finished.

    ``stop_after``: end early after this step, as if the process had been killed there.
    """
    run = folder / setting.name
    done = run / "training.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)  # the same sums whatever the machine has to spare
    logging.disable_progress_bar()
    corpus = write_corpus(folder, setting)
    tokenizer = make_tokenizer(folder)
    data = encode(read_words(folder / "train.jsonl"), tokenizer)
    torch.manual_seed(setting.seed)
    model = make_model(setting, corpus["vocabulary"], setting.longest + len(("<bos>", "<eos>")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, weight_decay=setting.weight_decay)
    step, tokens_seen, seconds, recent = 0, 0, 0.0, []
    run.mkdir(parents=True, exist_ok=True)
    if (run / STATE).exists():
        state = torch.load(run / STATE, weights_only=True)
        if state["setting"] != asdict(setting):
            raise SystemExit(f"{run} was started with other settings: {state['setting']}. Use another folder.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, tokens_seen, seconds, recent = (state[key] for key in ("step", "tokens_seen", "cpu_seconds", "recent"))
        print(f"{setting.name}: continues at step {step}", flush=True)
    # CPU seconds of this one thread: what a quiet machine would take, whatever else runs beside it.
    started = time.process_time() - seconds
    kept = set(setting.kept())
    model.train()

    while True:
        if step in kept and not (run / f"step{step}" / "trace_offline.json").exists():
            save_checkpoint(model, run, step, tokenizer=tokenizer, tokens_seen=tokens_seen)
        elif step in kept:
            _must_equal(model, run / f"step{step}")
        if step in kept:
            seconds = time.process_time() - started
            _save_state(
                run / STATE,
                {
                    "setting": asdict(setting),
                    "step": step,
                    "tokens_seen": tokens_seen,
                    "cpu_seconds": seconds,
                    "recent": recent,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                },
            )
            shown = f"{sum(recent) / len(recent):.3f}" if recent else "-"
            print(f"{setting.name}  step {step:>5}  training loss {shown}  {seconds:7.1f} CPU s", flush=True)
        if step == setting.steps or step == stop_after:
            break
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * min(1.0, (step + 1) / setting.warmup)  # linear, then constant
        loss, count = backward(model, batch_of(step, data, setting))
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss]
        tokens_seen += count
        step += 1

    result = {
        "name": setting.name,
        "setting": asdict(setting),
        "corpus": corpus,
        "parameters": model.num_parameters(),
        "steps": step,
        "tokens_seen": tokens_seen,
        "cpu_seconds": round(seconds, 1),
        "torch": torch.__version__.split("+")[0],
        "machine": f"{platform.machine()} CPU, one thread",
        "training_loss_of_last_100_steps": sum(recent) / len(recent) if recent else None,
    }
    if step == setting.steps:
        done.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (run / STATE).unlink()
    return result


def _must_equal(model: GPT2LMHeadModel, checkpoint: Path) -> None:
    """A run that went on must meet the weights it saved before it was stopped."""
    before = load_file(checkpoint / "model.safetensors")
    now = model.state_dict()
    if any(not torch.equal(tensor, now[name]) for name, tensor in before.items()):
        raise SystemExit(f"{checkpoint}: differs from the weights of the continued run. Start the run anew.")


def _save_state(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one of the paper's small decoders; resumes when started again.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the corpus and the runs")
    defaults = Setting()
    for field in ("layers", "seed", "sentences", "epochs"):
        parser.add_argument(f"--{field}", type=int, default=getattr(defaults, field))
    given = parser.parse_args()
    setting = replace(defaults, layers=given.layers, seed=given.seed, sentences=given.sentences, epochs=given.epochs)
    train(given.output, setting)


if __name__ == "__main__":
    main()
