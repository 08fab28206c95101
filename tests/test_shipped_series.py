"""The series in data/: complete, small, learned for real, and what its log and its recipe say it is."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_offline.corpus import AnnotatedSentence, generate, generate_to_file
from trace_offline.evaluation.evaluation_set import EvaluationSet

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
SERIES = DATA / "tiny_series"
EXAMPLE = ROOT / "examples" / "train_tiny_series.py"
STEPS = sorted(int(folder.name.removeprefix("step")) for folder in SERIES.iterdir() if folder.is_dir())
LOG = json.loads((DATA / "training_log.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluation() -> EvaluationSet:
    return EvaluationSet.load(DATA / "tiny_evaluation")


@pytest.fixture(scope="module")
def sentences(evaluation: EvaluationSet) -> list[AnnotatedSentence]:
    """The evaluation sentences as the generator writes them today."""
    fitting = (s for s in generate(0) if len(s.words) <= evaluation.max_length - 2)
    return list(islice(fitting, evaluation.n_examples))


def load(step: int) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(SERIES / f"step{step}", dtype=torch.float32).eval()


def states(step: int, evaluation: EvaluationSet) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embedding and raw block outputs by forward hooks, [1000, 32, width] each, and the logits."""
    model, batch = load(step), evaluation.tokens(0, evaluation.n_examples)
    found: list[torch.Tensor] = []
    for module in (model.gpt_neox.embed_in, *model.gpt_neox.layers):
        module.register_forward_hook(lambda _m, _i, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    return found, logits


def loss_of(logits: torch.Tensor, evaluation: EvaluationSet) -> float:
    """Mean loss per word, from the definition: log-probability of each token after BOS that is not special."""
    ids = evaluation.tokens(0, evaluation.n_examples).input_ids
    logp = torch.log_softmax(logits[:, :-1].double(), dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    counted = ~torch.isin(ids[:, 1:], torch.tensor(evaluation.special_token_ids))
    return float(-logp[counted].mean())


def test_small_enough_and_long_enough() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12_000_000
    assert len(STEPS) >= 12
    last = STEPS[-1]
    assert [0] + [2**k for k in range(last.bit_length())] == STEPS
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]  # safetensors only
    assert [entry["step"] for entry in LOG["held_out"]] == STEPS
    for entry in LOG["held_out"]:
        record = json.loads((SERIES / f"step{entry['step']}" / "trace_offline.json").read_text())
        assert (record["step"], record["tokens_seen"]) == (entry["step"], entry["tokens_seen"])


def test_every_checkpoint_loads_whole_and_differs_from_the_others() -> None:
    digests = set()
    for step in STEPS:
        model, info = AutoModelForCausalLM.from_pretrained(SERIES / f"step{step}", output_loading_info=True)
        assert {key: list(keys) for key, keys in info.items() if keys} == {}
        assert model.config.model_type == "gpt_neox"
        assert model.config.use_parallel_residual
        assert model.num_parameters() == LOG["parameters"]
        digests.add(hashlib.sha256((SERIES / f"step{step}" / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == len(STEPS)
    assert len({(SERIES / f"step{step}" / "tokenizer.json").read_bytes() for step in STEPS}) == 1


def test_the_evaluation_set_is_the_generators_with_its_gold(
    evaluation: EvaluationSet, sentences: list[AnnotatedSentence]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SERIES / f"step{STEPS[-1]}")
    batch = evaluation.tokens(0, evaluation.n_examples)
    coded = tokenizer([s.text for s in sentences], padding="max_length", max_length=32, return_tensors="pt")
    assert torch.equal(coded["input_ids"], batch.input_ids)
    assert torch.equal(coded["attention_mask"].bool(), batch.attention_mask)
    assert not (batch.input_ids == tokenizer.unk_token_id).any()
    assert evaluation.special_token_ids == (0, 1, 2, 3)
    assert evaluation.tasks == ("pos", "role")
    for task in evaluation.tasks:
        spans = evaluation.spans(task)
        found = list(
            zip(spans.row.tolist(), spans.start.tolist(), spans.end.tolist(), spans.label.tolist(), strict=True)
        )
        expected = [
            (row, i + 1, i + 2, spans.classes.index(label))
            for row, s in enumerate(sentences)
            for i, label in enumerate(s.pos if task == "pos" else s.roles)
            if label is not None
        ]
        assert found == expected
    roles = evaluation.spans("role")
    assert len(roles.classes) == 9
    for side in (0, 1):  # every role often enough to fit and to score
        inside = evaluation.split[roles.row] == side
        assert np.bincount(roles.label[inside], minlength=9).min() >= 20


def test_it_learned(evaluation: EvaluationSet) -> None:
    ids = evaluation.tokens(0, evaluation.n_examples).input_ids
    counts = np.array(list(Counter(ids[ids > 3].tolist()).values()))
    shares = counts / counts.sum()
    entropy = -float(shares @ np.log(shares))
    losses = {step: loss_of(states(step, evaluation)[1], evaluation) for step in (STEPS[0], STEPS[-1])}
    assert losses[STEPS[-1]] < entropy - 1.0
    assert losses[STEPS[-1]] < losses[STEPS[0]] - 2.0
    assert losses[STEPS[0]] == pytest.approx(np.log(LOG["vocabulary"]), abs=0.1)  # untrained: near uniform
    assert LOG["unigram_entropy"] == pytest.approx(entropy, abs=1e-9)
    logged = {entry["step"]: entry["loss"] for entry in LOG["held_out"]}
    for step, value in losses.items():
        assert logged[step] == pytest.approx(value, abs=1e-4)
    assert all(later < earlier for earlier, later in zip(logged.values(), list(logged.values())[1:], strict=False))


def test_roles_become_decodable_above_the_embedding_and_control_labels_do_not(evaluation: EvaluationSet) -> None:
    spans, ids = evaluation.spans("role"), evaluation.tokens(0, evaluation.n_examples).input_ids.numpy()
    fit, score = (evaluation.split[spans.row] == side for side in (0, 1))
    per_type = np.random.default_rng(0).integers(0, 9, size=LOG["vocabulary"])
    control = per_type[ids[spans.row, spans.start]]

    def macro_f1(hidden: torch.Tensor, labels: np.ndarray) -> float:
        x = hidden[spans.row, spans.start].double().numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, tol=1e-3))
        probe.fit(x[fit], labels[fit])
        return float(f1_score(labels[score], probe.predict(x[score]), average="macro"))

    first, last = states(STEPS[0], evaluation)[0], states(STEPS[-1], evaluation)[0]
    layers = range(len(first))
    before = [macro_f1(first[i], spans.label) for i in layers]
    after = [macro_f1(last[i], spans.label) for i in layers]
    assert before[0] < 0.15  # the noun alone tells nothing, then or later
    assert after[0] < 0.15
    assert max(before) < 0.35
    assert min(after[2:]) > 0.7
    assert max(after) > max(before) + 0.4
    top = layers[-1]
    assert macro_f1(last[top], control) < macro_f1(first[top], control) + 0.05


def test_the_example_uses_nothing_of_ours_but_recording() -> None:
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert {name for name in imported if name.startswith("trace_offline")} == {"trace_offline.recording"}


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example as a module; the process-wide switches it sets are put back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    spec = importlib.util.spec_from_file_location("train_tiny_series", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    module.logging.enable_progress_bar()


def test_training_twice_gives_the_same_bytes(example: ModuleType, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    generate_to_file(corpus, 400, seed=0)
    logs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        given = argparse.Namespace(
            corpus=corpus,
            output=tmp_path / name,
            steps=5,
            batch=8,
            rate=1e-3,
            layers=1,
            width=16,
            held_out=50,
            seed=seed,
            threads=1,
        )
        logs.append(example.train(given))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert {f.parts[1] for f in files if f.parts[0] == "tiny_series"} == {f"step{s}" for s in (0, 1, 2, 4, 5)}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert logs[0]["held_out"] == logs[1]["held_out"] != logs[2]["held_out"]
    shapes = EvaluationSet.load(tmp_path / "a" / "tiny_evaluation")
    assert (shapes.n_examples, shapes.max_length, shapes.tasks) == (50, 32, ("pos", "role"))


@pytest.mark.slow
def test_the_recipe_gives_the_same_corpus_and_the_same_first_steps(example: ModuleType, tmp_path: Path) -> None:
    """The shipped start of the series, from nothing. Weights to rounding: processors differ in the last bits."""
    corpus = tmp_path / "corpus.jsonl"
    recipe = re.search(
        r"trace_offline\.corpus --sentences (\d+) --seed (\d+)", (DATA / "README.md").read_text(encoding="utf-8")
    )
    assert recipe is not None
    generate_to_file(corpus, int(recipe[1]), seed=int(recipe[2]))
    assert hashlib.sha256(corpus.read_bytes()).hexdigest() == LOG["corpus_sha256"]
    given = argparse.Namespace(corpus=corpus, output=tmp_path / "again", **LOG["arguments"])
    full = example.learning_rate
    steps = given.steps
    given.steps = 4
    example.learning_rate = lambda step, _steps, peak: full(step, steps, peak)  # the schedule of the whole run
    log = example.train(given)
    assert (
        EvaluationSet.load(tmp_path / "again" / "tiny_evaluation").hash
        == EvaluationSet.load(DATA / "tiny_evaluation").hash
    )
    for entry, shipped in zip(log["held_out"], LOG["held_out"], strict=False):
        assert entry["tokens_seen"] == shipped["tokens_seen"]
        assert entry["loss"] == pytest.approx(shipped["loss"], abs=1e-3)
