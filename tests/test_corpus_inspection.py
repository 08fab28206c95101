"""What `corpus inspect` counts and measures, in files of every form."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_files import BY_HAND, RUN, write

from trace_offline.cli.main import app
from trace_offline.core.errors import UsageError
from trace_offline.corpus import (
    CorpusParams,
    fit_zipf,
    generate,
    generate_to_file,
    origin_path,
    read_jsonl,
)
from trace_offline.corpus.forms import FORMS
from trace_offline.corpus.inspection import inspect_corpus
from trace_offline.corpus.sampling import zipf_probabilities
from trace_offline.corpus.statistics import fit_zipf_by_count


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("inspected") / "c.jsonl"
    generate_to_file(path, 6000, 5, CorpusParams(noun_adjective=0.6, entropy=4.0))
    done = RUN.invoke(app, ["corpus", "inspect", str(path), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return path, json.loads(done.stdout)


def test_inspection_counts_what_is_there(inspected: tuple[Path, dict[str, Any]]) -> None:
    path, found = inspected
    sentences = list(read_jsonl(path))
    assert (found["form"], found["sentences"]) == ("jsonl", 6000)
    assert found["distinct_sentences"] == len({s.words for s in sentences})
    assert found["words"] == sum(len(s.words) for s in sentences)
    assert found["word_types"] == len({w for s in sentences for w in s.words})
    lengths = [len(s.words) for s in sentences]
    assert (found["length"]["min"], found["length"]["max"]) == (min(lengths), max(lengths))
    assert found["length"]["mean"] == pytest.approx(sum(lengths) / 6000)
    assert {int(k): v for k, v in found["length"]["counts"].items()} == Counter(lengths)
    counts = {
        "complexity": Counter(s.complexity for s in sentences),
        "frames": Counter(s.frame for s in sentences),
        "clause_frames": Counter(c.frame for s in sentences for c in s.clauses),
        "roles": Counter(role for s in sentences for role in s.roles if role),
        "pos": Counter(tag for s in sentences for tag in s.pos),
    }
    for name, expected in counts.items():
        assert {each: row["count"] for each, row in found[name].items()} == expected
        assert sum(row["share"] for row in found[name].values()) == pytest.approx(1.0)
    attracted = sum(c.attractors > 0 for s in sentences for c in s.clauses)
    assert found["clauses_with_attractors"] == attracted / sum(len(s.clauses) for s in sentences)


def test_inspection_measures_what_was_asked(inspected: tuple[Path, dict[str, Any]]) -> None:
    _, found = inspected
    noun = found["zipf"]["noun"]
    assert noun["ranks"] == "lexicon"
    assert abs(noun["value"] - noun["asked"]) < 4 * noun["stderr"]
    bits = found["entropy"]["content word given its list"]
    assert bits["asked"] == pytest.approx(bits["expected"]) == 4.0
    assert abs(bits["value"] - 4.0) < 4 * bits["stderr"]
    for kind, asked in (("noun_adjective", 0.6), ("verb_noun", 0.0), ("verb_adverb", 0.0)):
        row = found["collocations"][kind]
        assert row["strength"]["asked"] == asked
        assert abs(row["strength"]["value"] - asked) < 4 * row["strength"]["stderr"]
        assert abs(row["bits"]["value"] - row["bits"]["expected"]) < 4 * row["bits"]["stderr"]
        values = [each["pmi"] for each in row["strongest"]]
        assert values == sorted(values, reverse=True)
        assert all(each["count"] >= 10 and len(each["words"]) == 2 for each in row["strongest"])
    assert found["parameters"]["seed"] == 5


def test_inspection_without_parameters_ranks_words_by_count(
    inspected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, known = inspected
    bare = tmp_path / "bare.jsonl"
    bare.write_bytes(path.read_bytes())
    found = inspect_corpus(bare)
    assert found["parameters"] is None
    noun = found["zipf"]["noun"]
    assert noun["ranks"] == "by count"
    assert abs(noun["value"] - known["zipf"]["noun"]["value"]) < 0.03
    assert found["collocations"]["noun_adjective"]["bits"]["value"] == pytest.approx(
        known["collocations"]["noun_adjective"]["bits"]["value"]
    )
    assert "strength" not in found["collocations"]["noun_adjective"]
    origin_path(bare).write_bytes(origin_path(path).read_bytes().replace(b'"lexicon_seed": 0', b'"lexicon_seed": 1'))
    with pytest.raises(UsageError, match="are not those it was made with"):
        inspect_corpus(bare)


def test_repeated_sentences_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", ["a b", "a b", "c", "a b"])
    found = inspect_corpus(path)
    assert (found["sentences"], found["distinct_sentences"]) == (4, 2)
    assert found["roles"] is None
    assert found["collocations"] is None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_inspected(tmp_path: Path, form: str) -> None:
    path = tmp_path / "c"
    generate_to_file(path, 3000, 0, form=form)
    found = inspect_corpus(path)
    assert found["form"] == form
    json.dumps(found, allow_nan=False)
    sentences = list(islice(generate(0), 3000))
    roles = Counter(role for s in sentences for role in s.roles if role)
    assert (found["roles"] is None) == (form == "sentences_only")
    if form != "sentences_only":
        assert {name: row["count"] for name, row in found["roles"].items()} == roles
    assert (found["pos"] is not None) == (form in ("jsonl", "absynth"))
    assert (found["complexity"] is not None) == (form in ("jsonl", "absynth"))
    assert (found["frames"] is not None) == (form in ("jsonl", "absynth", "semantic_annotations"))
    shown = RUN.invoke(app, ["corpus", "inspect", str(path)])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert f"({form})" in shown.stdout
    assert "3000 sentences" in shown.stdout
    assert "Zipf exponent:" in shown.stdout


@pytest.mark.parametrize("form", BY_HAND)
def test_files_by_hand_can_be_inspected(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "c.json", BY_HAND[form])
    shown = RUN.invoke(app, ["corpus", "inspect", str(path)])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert json.loads(RUN.invoke(app, ["corpus", "inspect", str(path), "--json"]).stdout)["form"] == form


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    failed = RUN.invoke(app, ["corpus", "inspect", str(tmp_path / "none.json")])
    assert isinstance(failed.exception, UsageError)
    assert "none.json: cannot read the corpus" in str(failed.exception)


def test_ranks_by_count_are_unbiased_where_sorting_alone_is_not() -> None:
    rng = np.random.default_rng(0)
    for types, n, alpha in ((110, 5000, 0.5), (110, 5000, 1.0), (300, 1000, 0.3), (2000, 20_000, 1.5)):
        samples = [rng.multinomial(n, zipf_probabilities(types, alpha)) for _ in range(8)]
        fits = [fit_zipf_by_count(rng.permutation(sample)) for sample in samples]
        spread = np.std([fit.alpha for fit in fits], ddof=1)
        assert abs(np.mean([fit.alpha for fit in fits]) - alpha) < 0.03
        assert 0.4 * spread < np.mean([fit.stderr for fit in fits]) < 2.5 * spread
    ordered = np.sort(rng.multinomial(1000, zipf_probabilities(300, 0.3)))[::-1]
    assert fit_zipf(ordered[ordered > 0]).alpha > 0.37  # what sorting alone makes of 0.3
