"""All five analyzers, by one test, on every family of models, on real English, and on what is no language model."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_data
from tiny_models import ARCHITECTURES, VOCABULARY, unknown_net
from torch import Tensor, nn

from trace_offline import EvaluationSet, Store, analyze, build_evaluation_set
from trace_offline.recording import save_checkpoint, save_evaluation_set

QUICK = {
    "hessian": {"k": 2, "slq_probes": 2, "slq_steps": 4, "max_sequences": 4},
    "intrinsic_dimension": {"max_samples": 200},
}
HIDDEN = {"probe", "intrinsic_dimension"}


def annotated(ids: Tensor, lengths: Tensor, first: int) -> list[tuple[int, str, int, int, str]]:
    """Whether the token before is odd: something a context model may know and an embedding cannot."""
    return [
        (row, "before", t, t + 1, "odd" if int(ids[row, t - 1]) % 2 else "even")
        for row in range(len(ids))
        for t in range(max(1, first), int(lengths[row]))
    ]


def make_set(folder: Path, kind: str) -> Path:
    """60 sequences of 6 to 12 tokens; for the masked model one token in six is to be guessed."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (60, 12), generator=generator)
    lengths = torch.randint(6, 13, (60,), generator=generator)
    mask = torch.arange(12)[None] < lengths[:, None]
    if kind != "bert":
        return save_evaluation_set(folder, ids, mask, annotations=annotated(ids, lengths, 1), name=kind)
    hidden = (torch.rand(ids.shape, generator=generator) < 1 / 6) & mask
    return save_evaluation_set(
        folder, ids.masked_fill(hidden, 3), mask, labels=ids.masked_fill(~hidden, -100), labels_shifted=False,
        annotations=annotated(ids, lengths, 1), name=kind, objective="masked_lm", special_token_ids=(3,),
    )  # fmt: skip


def statuses(store: Path) -> dict[tuple[int, str], tuple[str, str]]:
    rows = Store.open(store).sql("select step, analyzer, status, message from status").to_pylist()
    return {(row["step"], row["analyzer"]): (row["status"], str(row["message"])) for row in rows}


def reference_loss(model: nn.Module, evaluation: EvaluationSet) -> float:
    """Cross-entropy over all targets, one sequence at a time, without padding or anything of ours in between."""
    total, count = 0.0, 0
    for row in range(evaluation.n_examples):
        batch = evaluation.tokens(row, row + 1)
        length = int(batch.attention_mask.sum())
        ids, targets = batch.input_ids[:, :length], batch.targets[:, :length]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        total += float(nn.functional.cross_entropy(logits[0].double(), targets[0], reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    evaluation = make_set(tmp_path / "evaluation", kind)
    models = [ARCHITECTURES[kind](seed=seed) for seed in (0, 1)]
    for step, model in enumerate(models):
        save_checkpoint(model, tmp_path / "run", step)
    store = tmp_path / "s.duckdb"
    summary = analyze(tmp_path / "run", evaluation, store, params=QUICK, jobs=1)
    assert summary.exit_code == 0, summary.problems
    assert {status for status, _ in statuses(store).values()} == {"ok"}
    opened = Store.open(store)
    for step, model in enumerate(models):
        value = opened.scalar(
            "select value from history where step = ? and analyzer = 'loss' and metric = 'loss'", [step]
        )
        assert value == pytest.approx(reference_loss(model, EvaluationSet.load(evaluation)), rel=1e-5)
    layers = opened.sql("select distinct layer from history where metric = 'macro_f1' and label is null order by 1")
    n_layers = models[0].config.num_hidden_layers
    assert layers.column(0).to_pylist() == list(range(n_layers + 1))
    assert opened.scalar("select count(*) from history where value is null and reason is null") == 0
    assert opened.scalar("select count(*) from history where isnan(value) or isinf(value)") == 0
    for metric in ("eigenvalue", "trace", "gradient_norm", "gradient_curvature", "negative_mass", "products"):
        assert opened.scalar("select count(*) from history where metric = ? and value is not null", [metric]) >= 2


def factory(weights: dict[str, Tensor], path: Path) -> nn.Module:
    """What a user writes for a model transformers does not know."""
    model = unknown_net()
    model.load_state_dict(weights)
    return model


def test_a_model_transformers_does_not_know(tmp_path: Path) -> None:
    evaluation = make_set(tmp_path / "evaluation", "unknown")
    (tmp_path / "run").mkdir()
    for step in (10, 9, 100):
        torch.save(unknown_net(seed=step).state_dict(), tmp_path / "run" / f"model_{step}.pt")
    store = tmp_path / "s.duckdb"
    analyze(tmp_path / "run", evaluation, store, params=QUICK, jobs=1, model_factory="test_main_job:factory")
    assert {status for status, _ in statuses(store).values()} == {"ok"}
    assert sorted({step for step, _ in statuses(store)}) == [9, 10, 100]


class Blockless(nn.Module):
    """(a + b) mod p by embeddings and one hidden layer: no blocks, no tokenizer, no next token."""

    def __init__(self, modulus: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(modulus + 1, width)
        self.hidden = nn.Linear(2 * width, 128)
        self.out = nn.Linear(128, modulus)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        a, b = self.embed(input_ids[:, 0]), self.embed(input_ids[:, 1])
        answer = self.out(torch.relu(self.hidden(torch.cat([a, b], -1))))
        return answer[:, None].expand(-1, input_ids.shape[1], -1)


MODULUS = 11


def addition_factory(weights: dict[str, Tensor], path: Path) -> nn.Module:
    """The factory of the modular-addition network."""
    model = Blockless(MODULUS)
    model.load_state_dict(weights)
    return model


def test_modular_addition_is_no_language_model(tmp_path: Path) -> None:
    """Trained here, saved as raw state dicts, with labels of its own at the position of the equals sign."""
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    ids = torch.cat([pairs, torch.full((len(pairs), 1), MODULUS)], 1)
    answers = pairs.sum(1) % MODULUS
    labels = torch.full_like(ids, -100)
    labels[:, 2] = answers
    evaluation = save_evaluation_set(
        tmp_path / "evaluation", ids, labels=labels, labels_shifted=False, objective="algorithmic", name="addition"
    )
    model = Blockless(MODULUS)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    (tmp_path / "run").mkdir()
    expected = {}
    for step in range(201):
        logits = model(ids, torch.ones_like(ids))[:, 2]
        loss = nn.functional.cross_entropy(logits, answers)
        if step in (0, 20, 200):
            torch.save({"model": model.state_dict(), "step": step}, tmp_path / "run" / f"step_{step}.pt")
            expected[step] = (float(loss.detach()), float((logits.argmax(-1) == answers).float().mean()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    store = tmp_path / "s.duckdb"
    summary = analyze(tmp_path / "run", evaluation, store, params=QUICK, jobs=1,
                      model_factory="test_main_job:addition_factory")  # fmt: skip
    assert summary.exit_code == 0, summary.problems
    got = Store.open(store).sql(
        "select step, max(value) filter (where metric = 'loss') as loss, "
        "max(value) filter (where metric = 'accuracy') as accuracy from history where analyzer = 'loss' "
        "group by step order by step"
    )
    for row in got.to_pylist():
        assert (row["loss"], row["accuracy"]) == pytest.approx(expected[row["step"]], rel=1e-4)
    assert expected[200][1] > 0.95
    for (_, analyzer), (status, message) in statuses(store).items():
        assert status == ("not_applicable" if analyzer in HIDDEN | {"output"} else "ok"), message
        if status == "not_applicable":
            assert len(message) > 20


def stories(path: Path) -> list[str]:
    return [text.strip() for text in path.read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]


def test_the_english_model_has_its_published_loss(stories_model: Path, tmp_path: Path) -> None:
    text = shared_data("text", "tinystories_sample.txt")
    build_evaluation_set(tmp_path / "evaluation", [text], tokenizer=stories_model)
    store = tmp_path / "s.duckdb"
    analyze(stories_model, tmp_path / "evaluation", store, analyzers=("loss",), jobs=1)
    row = Store.open(store).sql("select value, stderr, n from history where metric = 'loss'").to_pylist()[0]
    assert row["value"] == pytest.approx(1.2664, abs=5e-4)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    model = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for story in stories(text):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert row["n"] == count
    assert row["value"] == pytest.approx(total / count, rel=1e-5)


def test_parts_of_speech_in_real_english(stories_model: Path, tmp_path: Path) -> None:
    """Probes fitted on the development part of UD English EWT, scored on its test part."""
    dev, test = (shared_data("ud_english_ewt", f"en_ewt-ud-{part}.conllu.gz") for part in ("dev", "test"))
    few = []
    for path in (dev, test):
        target = tmp_path / path.name.removesuffix(".gz")
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            target.write_text("\n\n".join(stream.read().split("\n\n")[:200]) + "\n\n", encoding="utf-8")
        few.append(target)
    made = build_evaluation_set(
        tmp_path / "evaluation", [few[0]], test_sources=[few[1]], tokenizer=stories_model, tasks=["upos", "deprel"]
    )
    assert made.tasks == ("deprel", "upos")
    store = tmp_path / "s.duckdb"
    summary = analyze(stories_model, tmp_path / "evaluation", store, analyzers=("probe", "output"), jobs=1)
    assert summary.exit_code == 0, summary.problems
    opened = Store.open(store)
    rows = opened.sql(
        "select task, layer, max(value) filter (where metric = 'accuracy') as accuracy, "
        "max(value) filter (where metric = 'majority_accuracy') as majority, "
        "max(stderr) filter (where metric = 'accuracy') as stderr from history "
        "where analyzer = 'probe' and label is null and layer is not null group by all order by task, layer"
    ).to_pylist()
    assert [row["layer"] for row in rows] == [*range(6), *range(6)]
    for row in rows:
        assert row["accuracy"] > row["majority"] + 5 * row["stderr"]
        assert 0 < row["stderr"] < 0.03
    upos = [row["accuracy"] for row in rows if row["task"] == "upos"]
    assert max(upos) > 0.6
    assert max(upos[1:]) > upos[0] + 0.02  # context tells more than the sub-word alone


def test_continued_training_in_the_trainers_own_layout(stories_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate (test extra)")
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    text = shared_data("text", "tinystories_sample.txt")
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    model = AutoModelForCausalLM.from_pretrained(stories_model, dtype=torch.float32)
    ids = tokenizer(" ".join(stories(text)), add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": ids[i : i + 64], "labels": ids[i : i + 64]} for i in range(0, len(ids) - 64, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=40, save_steps=10, per_device_train_batch_size=8,
        learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    Trainer(model, arguments, default_data_collator, train_dataset=rows, processing_class=tokenizer).train()
    build_evaluation_set(tmp_path / "evaluation", [text], tokenizer=stories_model)
    store = tmp_path / "s.duckdb"
    # long sequences: one short product each is enough to see that the analyzer works in this layout
    few = {**QUICK, "hessian": {**QUICK["hessian"], "max_sequences": 1, "max_steps": 12, "tolerance": 0.1}}
    summary = analyze(tmp_path / "out", tmp_path / "evaluation", store, params=few, jobs=1, steps="10,40")
    assert summary.exit_code == 0, summary.problems
    summary = analyze(tmp_path / "out", tmp_path / "evaluation", store, analyzers=("loss",), jobs=1)
    assert summary.exit_code == 0, summary.problems
    losses = (
        Store.open(store)
        .sql("select step, value from history where analyzer = 'loss' and metric = 'loss' order by step")
        .to_pylist()
    )
    assert [row["step"] for row in losses] == [10, 20, 30, 40]
    # trained on the very text: the loss falls below where the model started
    assert losses[-1]["value"] < 1.2664 - 0.1
    assert np.all(np.diff([row["value"] for row in losses]) < 0)


def test_evaluation_set_and_checkpoint_of_different_tokenizers(stories_model: Path, tmp_path: Path) -> None:
    from trace_offline import EvaluationSetError

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(shared_data("tokenizers", "gpt2_tokenizer.json"), other / "tokenizer.json")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat.\n\nIt slept all day and all night.\n")
    build_evaluation_set(tmp_path / "evaluation", [text], tokenizer=other, name="cats")
    with pytest.raises(EvaluationSetError) as caught:
        analyze(stories_model, tmp_path / "evaluation", tmp_path / "s.duckdb", jobs=1)
    assert "cats" in caught.value.message
    assert stories_model.name in caught.value.message
