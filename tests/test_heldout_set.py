"""A second evaluation set: whose identity it changes, who gets it, what is refused, and that rerun finds it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallSeries
from typer.testing import CliRunner

from trace_offline import EvaluationSetError, Store, UsageError, analyze, rerun
from trace_offline.cli.main import app
from trace_offline.engine.unit import HELDOUT, Wanted
from trace_offline.evaluation.evaluation_set import EvaluationSet
from trace_offline.recording import save_evaluation_set

COMPARES = "train_heldout_curvature"
SMALL = {"max_sequences": 3, "max_tokens": 60, "trace_probes": 2, "tolerance": 0.1, "max_steps": 40}


def other_set(folder: Path, seed: int = 5, **options: Any) -> Path:
    """Twelve sequences with the small model's vocabulary."""
    ids = torch.randint(3, 20, (12, 10), generator=torch.Generator().manual_seed(seed))
    save_evaluation_set(folder, ids, name=options.pop("name", folder.name), **options)
    return folder


def ids(store: Path, analyzer: str) -> set[str]:
    rows = Store.open(store).sql("select analysis_id from analyses where analyzer = ?", [analyzer])
    return set(rows.column(0).to_pylist())


def run(series: SmallSeries, store: Path, *analyzers: str, **options: Any) -> Any:
    params = {COMPARES: SMALL} if COMPARES in analyzers else {}
    return analyze(
        series.run, series.evaluation, store, analyzers=analyzers, params=params, jobs=1, steps="1", **options
    )


def test_only_the_analyses_that_look_at_it_get_another_identity(small_series: SmallSeries, tmp_path: Path) -> None:
    store, heldout = tmp_path / "s.duckdb", other_set(tmp_path / "heldout")
    first = run(small_series, store, "loss", COMPARES)
    assert (first.ok, first.not_applicable) == (1, 1)
    alone, without = ids(store, "loss"), ids(store, COMPARES)
    second = run(small_series, store, "loss", COMPARES, heldout_set=heldout)
    assert (second.ok, second.already_done) == (1, 1)
    assert ids(store, "loss") == alone
    assert ids(store, COMPARES) > without
    third = run(small_series, store, "loss", COMPARES, heldout_set=heldout)
    assert (third.ok, third.already_done) == (0, 2)
    another = run(small_series, store, COMPARES, heldout_set=other_set(tmp_path / "another", seed=6))
    assert another.ok == 1
    rows = Store.open(store).sql(
        "select params->>'heldout_set' as heldout, value, is_latest from history where metric = 'trace_ratio' "
        "order by analysis_id"
    )
    found = {row["heldout"]: row for row in rows.to_pylist()}
    expected = {EvaluationSet.load(heldout).hash, EvaluationSet.load(tmp_path / "another").hash}
    assert set(found) == expected
    assert len({row["value"] for row in found.values()}) == 2
    assert found[EvaluationSet.load(tmp_path / "another").hash]["is_latest"]


def test_rerun_finds_it_again(small_series: SmallSeries, tmp_path: Path) -> None:
    store, heldout = tmp_path / "s.duckdb", other_set(tmp_path / "heldout")
    run(small_series, store, COMPARES, heldout_set=heldout)
    # later requests without it do not make rerun forget it
    run(small_series, store, "loss")
    (summary,) = rerun(store, COMPARES, {"trace_probes": 3}, jobs=1, steps=None)
    assert summary.failed == 0
    assert summary.ok == 1
    latest = Store.open(store).sql(
        "select distinct params->>'heldout_set', params->>'trace_probes' from history "
        "where analyzer = 'train_heldout_curvature' and is_latest"
    )
    assert [tuple(row.values()) for row in latest.to_pylist()] == [(EvaluationSet.load(heldout).hash, "3")]
    moved = heldout.rename(tmp_path / "moved")
    with pytest.raises(EvaluationSetError, match="heldout"):
        rerun(store, COMPARES, jobs=1)
    (again,) = rerun(store, COMPARES, jobs=1, heldout_set=moved)
    assert (again.ok, again.already_done + again.shared) == (0, 1)
    (known,) = rerun(store, COMPARES, jobs=1)
    assert (known.ok, known.already_done + known.shared) == (0, 1)


def test_rerun_of_what_never_succeeded_takes_the_set_of_the_last_request(
    small_series: SmallSeries, tmp_path: Path
) -> None:
    store, large = tmp_path / "s.duckdb", tmp_path / "large"
    save_evaluation_set(large, torch.full((3, 5), 100_000), name="large")
    assert run(small_series, store, COMPARES, heldout_set=large).failed == 1
    (summary,) = rerun(store, COMPARES, SMALL, jobs=1)
    assert summary.failed > 0
    assert '"large" contains token id 100000' in summary.problems[0]


def test_what_cannot_be_compared_is_refused(small_series: SmallSeries, tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    heldout = other_set(tmp_path / "heldout")
    with pytest.raises(
        UsageError, match=r"--heldout-set is given, but none .* \(loss\) uses .* These do: .*train_heldout_curvature"
    ):
        run(small_series, store, "loss", heldout_set=heldout)
    with pytest.raises(UsageError, match="has the same content as --evaluation-set"):
        run(small_series, store, COMPARES, heldout_set=small_series.evaluation)
    masked = other_set(tmp_path / "masked", objective="masked_lm", labels_shifted=False, labels=torch.full((12, 10), 4))
    with pytest.raises(EvaluationSetError, match=r'"masked" .* has the objective masked_lm, .* "small" causal_lm'):
        run(small_series, store, COMPARES, heldout_set=masked)
    with pytest.raises(EvaluationSetError, match="nowhere"):
        run(small_series, store, COMPARES, heldout_set=tmp_path / "nowhere")
    assert not store.exists()


def test_another_tokenizer_is_refused(
    small_series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_offline.engine import heldout as module

    load = EvaluationSet.load

    def with_tokenizer(folder: Path) -> EvaluationSet:
        loaded = load(folder)
        object.__setattr__(loaded, "tokenizer_hash", f"hash of {loaded.name}")
        return loaded

    evaluation = with_tokenizer(small_series.evaluation)
    monkeypatch.setattr(module.EvaluationSet, "load", staticmethod(with_tokenizer))
    with pytest.raises(EvaluationSetError, match=r"\(hash hash of heldout\), .*\(hash hash of small\).*two tokenizers"):
        module.load_heldout(other_set(tmp_path / "heldout"), evaluation)


def test_tokens_beyond_the_vocabulary_are_refused_for_the_comparison_alone(
    small_series: SmallSeries, tmp_path: Path
) -> None:
    store, large = tmp_path / "s.duckdb", tmp_path / "large"
    save_evaluation_set(large, torch.full((3, 5), 100_000), name="large")
    summary = run(small_series, store, "loss", COMPARES, heldout_set=large)
    assert (summary.ok, summary.failed) == (1, 1)
    assert '"large" contains token id 100000' in summary.problems[0]


def test_by_command_and_configuration_file(small_series: SmallSeries, tmp_path: Path) -> None:
    store, heldout = tmp_path / "s.duckdb", other_set(tmp_path / "heldout")
    config = tmp_path / "run.toml"
    params = "\n".join(f"{name} = {value}" for name, value in SMALL.items())
    config.write_text(
        f'heldout_set = "{heldout}"\nanalyzers = ["{COMPARES}"]\nsteps = "0"\njobs = 1\n'
        f"[analyzer.{COMPARES}]\n{params}\n"
    )
    base = ["analyze", str(small_series.run), "--evaluation-set", str(small_series.evaluation), "--store", str(store)]
    done = CliRunner().invoke(app, [*base, "--config", str(config), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["ok"] == 1
    again = CliRunner().invoke(
        app, ["rerun", str(store), "--analyzer", COMPARES, "--steps", "0", "--heldout-set", str(heldout), "--json"]
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)[0]["already_done"] == 1
    other = other_set(tmp_path / "other", seed=9)
    changed = CliRunner().invoke(app, [*base, "--config", str(config), "--heldout-set", str(other), "--json"])
    assert changed.exit_code == 0, changed.output
    assert json.loads(changed.stdout)[0]["ok"] == 1


def test_identity_without_a_second_set_is_the_parameters_alone() -> None:
    assert Wanted("a", "1", {"k": 1}).identity() == {"k": 1}
    assert Wanted("a", "1", {"k": 1}, "h").identity() == {"k": 1, HELDOUT: "h"}
    assert Wanted("a", "1", {"k": 1}, "h").identity({}) == {HELDOUT: "h"}
