"""The activation cache: the same bits as without it, no network opened, nothing trusted that was not verified."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallSeries
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_offline import Store, UsageError, analyze, rerun
from trace_offline.activations.batch import ForwardBatch
from trace_offline.activations.kept import Kept, Recorder
from trace_offline.activations.places import Places
from trace_offline.cli.config import merge_settings, read_config
from trace_offline.engine.cache import ActivationCache, LazyModel, cache_folder, code_of, parse_size
from trace_offline.engine.options import AnalyzeOptions

HIDDEN = ("geometry", "intrinsic_dimension", "similarity")
PROBES = ("probe", "probe_transfer")  # slower
QUICK = {"penalties": [0.1], "tolerance": 0.1, "max_iterations": 5}
PARAMS: dict[str, dict[str, Any]] = {
    "intrinsic_dimension": {
        "max_samples": 60, "subsamples": 4, "gride_to": 0, "trace_flattened": True, "trace_flattened_rows": 10,
    },
    "geometry": {"max_samples": 100},
    "similarity": {"max_samples": 60, "jackknife_parts": 0},
    "probe": {"max_words": 60, "control": False, **QUICK},
    "probe_transfer": {"max_words": 60, "matrix": False, **QUICK},
}  # fmt: skip
NUMBERS = (
    "select step, analyzer, layer, component, task, label, metric, value, stderr, n, reason from history order by all"
)
ARRAYS = 'select step, analyzer, layer, task, label, name, "values" from arrays order by all'


def numbers(store: Path) -> list[Any]:
    """All numbers as they are stored, bit by bit: equal lists are equal floats."""
    opened = Store.open(store)
    return [opened.sql(NUMBERS).to_pylist(), opened.sql(ARRAYS).to_pylist()]


@pytest.fixture(scope="module")
def series(small_series: SmallSeries, tmp_path_factory: pytest.TempPathFactory) -> SmallSeries:
    """Two checkpoints of it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    for step in ("step0", "step1"):
        shutil.copytree(small_series.run / step, folder / step)
    return SmallSeries(folder, small_series.evaluation)


def run(series: SmallSeries, store: Path, names: tuple[str, ...] = HIDDEN, **options: Any) -> Any:
    params = options.pop("params", {name: PARAMS[name] for name in names if name in PARAMS})
    return analyze(series.run, series.evaluation, store, analyzers=names, params=params, jobs=1, **options)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From here on, whoever opens a network fails."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a network was opened")

    monkeypatch.setattr("trace_offline.checkpoints.loading.load_model", refuse)
    return monkeypatch


@pytest.fixture(scope="module")
def done(series: SmallSeries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``plain.duckdb`` (no cache) and ``cached.duckdb`` with its cache, of the same analyses."""
    folder = tmp_path_factory.mktemp("done")
    assert run(series, folder / "plain.duckdb").exit_code == 0
    assert run(series, folder / "cached.duckdb", cache="auto").exit_code == 0
    return folder


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(done, tmp_path / "done")
    return tmp_path / "done"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_off_by_default_and_invisible_in_the_numbers(done: Path) -> None:
    assert not (done / "plain.cache").exists()
    assert len(files(done / "cached.cache")) == 2
    assert numbers(done / "cached.duckdb") == numbers(done / "plain.duckdb")


def test_a_rerun_opens_no_network_and_gives_the_same_bits(mine: Path, closed: pytest.MonkeyPatch) -> None:
    before = numbers(mine / "plain.duckdb")
    shutil.rmtree(mine / "cached.extracts")
    for name in HIDDEN:
        (summary,) = rerun(mine / "cached.duckdb", name, force=True)  # the cache is recorded with the run
        assert (summary.ok, summary.problems) == (2, [])
    assert numbers(mine / "cached.duckdb") == before


def test_another_store_shares_the_cache(
    series: SmallSeries, mine: Path, tmp_path: Path, closed: pytest.MonkeyPatch
) -> None:
    summary = run(series, tmp_path / "other.duckdb", cache=str(mine / "cached.cache"))
    assert summary.exit_code == 0, summary.problems
    assert numbers(tmp_path / "other.duckdb") == numbers(mine / "plain.duckdb")
    assert not (tmp_path / "other.cache").exists()


def test_fewer_tokens_are_served_and_more_are_added(
    series: SmallSeries, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache": str(mine / "cached.cache")}
    few, more = ({"geometry": {"max_samples": count}} for count in (40, 400))
    plain = {}
    for name, params in (("few", few), ("more", more)):
        run(series, tmp_path / f"{name}.duckdb", ("geometry",), params=params)
        plain[name] = numbers(tmp_path / f"{name}.duckdb")
    run(series, tmp_path / "added.duckdb", ("geometry",), params=more, **cache)
    assert numbers(tmp_path / "added.duckdb") == plain["more"]
    assert len(files(mine / "cached.cache")) == 2  # replaced, not added to
    monkeypatch.setattr("trace_offline.checkpoints.loading.load_model", None)
    for name, params in (("few", few), ("more", more)):
        assert run(series, tmp_path / f"{name}2.duckdb", ("geometry",), params=params, **cache).exit_code == 0
        assert numbers(tmp_path / f"{name}2.duckdb") == plain[name]
    # and what was there before the tokens that were added still is
    assert run(series, tmp_path / "before.duckdb", ("intrinsic_dimension", "similarity"), **cache).exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        {"names": ("loss",)},
        {"names": ("geometry", "loss")},
        {"names": ("weights",)},
        {"names": ("geometry",), "dtype": "float64"},
        {"names": ("geometry",), "params": {"geometry": {"max_samples": 500}}},
        {"names": ("geometry",), "cache": "off"},
        {"names": ("geometry",), "blocks": "gpt_neox.layers.*"},
        {"names": ("geometry",), "trust_remote_code": True},
    ],
    ids=str,
)
def test_what_the_cache_cannot_answer_opens_the_network(
    series: SmallSeries, done: Path, tmp_path: Path, closed: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    summary = run(series, tmp_path / "s.duckdb", **{"cache": str(done / "cached.cache"), **options})
    assert summary.ok == 0
    assert summary.failed == 2 * len(options["names"])
    assert "a network was opened" in summary.problems[0]


def test_another_seed_is_served_where_it_asks_for_known_tokens_only(
    series: SmallSeries, tmp_path: Path, closed: pytest.MonkeyPatch
) -> None:
    closed.undo()
    every = {"geometry": {"max_samples": 10_000}}
    cache = {"cache": str(tmp_path / "cache"), "params": every}
    run(series, tmp_path / "a.duckdb", ("geometry",), **cache)
    few = {"geometry": {"max_samples": 50}}
    run(series, tmp_path / "plain.duckdb", ("geometry",), seed=7, params=few)
    closed.setattr("trace_offline.checkpoints.loading.load_model", None)
    summary = run(series, tmp_path / "b.duckdb", ("geometry",), seed=7, **{**cache, "params": few})
    assert summary.exit_code == 0, summary.problems
    assert numbers(tmp_path / "b.duckdb") == numbers(tmp_path / "plain.duckdb")


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def damage_all(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_byte, damage_end, damage_all])
def test_a_damaged_file_is_removed_and_computed_again(
    series: SmallSeries, mine: Path, tmp_path: Path, damage: Any
) -> None:
    cache = mine / "cached.cache"
    path = files(cache)[1]
    damage(path)
    store = tmp_path / "s.duckdb"
    summary = run(series, store, ("geometry",), cache=str(cache))
    assert summary.exit_code == 0
    (note,) = [text for text in summary.warnings if "checksum" in text]
    assert str(path) in note
    assert "the checksum is wrong; the file was removed and its activations computed again" in note
    run(series, tmp_path / "plain.duckdb", ("geometry",))
    assert numbers(store) == numbers(tmp_path / "plain.duckdb")
    assert len(files(cache)) == 2
    assert all(Kept.open(item) is not None for item in files(cache))


def test_other_weights_and_lost_weights_are_not_served(
    series: SmallSeries, mine: Path, tmp_path: Path, closed: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    moved = tmp_path / "run"
    shutil.copytree(series.run, moved)
    shutil.copytree(moved / "step1", moved / "step7")
    weights = moved / "step7" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    (moved / "step1" / "model.safetensors").unlink()
    other = SmallSeries(moved, series.evaluation)
    summary = run(other, tmp_path / "s.duckdb", ("geometry",), cache=str(mine / "cached.cache"))
    # step 0 is as it was; step 7 has other weights; of step 1 nothing says any more what it was
    assert (summary.checkpoints, summary.ok, summary.failed) == (2, 1, 1)
    assert "a network was opened" in summary.problems[0]


CLASSES = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
    def forward(self, x):
        return x + self.inner(x) * {scale}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 40)
    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
"""
FACTORY = """
def make(weights, path):
    from cache_test_classes import Net
    net = Net()
    net.load_state_dict(weights)
    return net
"""


def test_edited_code_of_a_users_network_is_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trace_offline.recording import save_evaluation_set

    (tmp_path / "cache_test_classes.py").write_text(CLASSES.format(scale="1.0"))
    (tmp_path / "cache_test_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    from cache_test_classes import Net  # type: ignore[import-not-found]

    (tmp_path / "run").mkdir()
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "run" / "model_1.pt")
    save_evaluation_set(tmp_path / "set", torch.randint(0, 40, (20, 6)), name="users")
    series = SmallSeries(tmp_path / "run", tmp_path / "set")
    options = {"cache": str(tmp_path / "cache"), "model_factory": "cache_test_factory:make"}
    assert run(series, tmp_path / "a.duckdb", ("geometry",), **options).exit_code == 0
    monkeypatch.setattr("trace_offline.checkpoints.loading.load_model", None)
    assert run(series, tmp_path / "b.duckdb", ("geometry",), **options).exit_code == 0
    assert numbers(tmp_path / "b.duckdb") == numbers(tmp_path / "a.duckdb")
    (tmp_path / "cache_test_classes.py").write_text(CLASSES.format(scale="2.0"))
    assert run(series, tmp_path / "c.duckdb", ("geometry",), **options).failed == 1
    for name in ("cache_test_classes", "cache_test_factory"):
        sys.modules.pop(name)


def test_code_that_is_in_no_file_is_not_kept() -> None:
    scope: dict[str, Any] = {"nn": torch.nn, "__name__": "typed_by_hand"}
    exec("class Typed(nn.Module):\n  pass", scope)
    assert code_of(scope["Typed"]()) is None
    assert code_of(torch.nn.Linear(1, 1)) is not None


# --- places -----------------------------------------------------------------------------------------------------------

tokens = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=12)
whole = st.lists(st.integers(0, 6), max_size=4)


def cells(some: list[tuple[int, int]], rows: list[int]) -> set[tuple[int, int]]:
    return set(some) | {(row, position) for row in rows for position in range(6)}


def places(some: list[tuple[int, int]], rows: list[int]) -> Places:
    return Places.at([a for a, _ in some], [b for _, b in some]) | Places.whole(rows)


@settings(max_examples=60, deadline=None)
@given(tokens, whole, tokens, whole, st.integers(0, 7), st.integers(1, 4), st.integers(1, 6))
def test_places_are_sets(
    a: list[tuple[int, int]], a_rows: list[int], b: list[tuple[int, int]], b_rows: list[int],
    first: int, count: int, length: int,
) -> None:  # fmt: skip
    one, other = places(a, a_rows), places(b, b_rows)
    # a whole row is more than its tokens one by one: it goes as far as its batch does
    assert one.covers(other) == (cells(b, b_rows) <= cells(a, a_rows) and set(b_rows) <= set(a_rows))
    row, position = (one | other).within(first, count, length)
    found = list(zip((row + first).tolist(), position.tolist(), strict=True))
    expected = {(r, p) for r, p in cells(a + b, a_rows + b_rows) if first <= r < first + count and p < length}
    assert found == sorted(expected)


# --- the folder -------------------------------------------------------------------------------------------------------


def recorded(seed: int = 0, most: int = 10**9) -> Recorder:
    """Two batches of 4 rows, one token each, with 3 layers of width 100: 9,600 bytes."""
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder(Places.at(range(8), [1] * 8), most)
    for start in (0, 4):
        ids = torch.zeros(4, 3, dtype=torch.int64)
        hidden = tuple(torch.randn(4, 3, 100, generator=generator) for _ in range(3))
        recorder.update(ForwardBatch(torch.arange(start, start + 4), ids, ids.bool(), ids, hidden))
    return recorder


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, 35_000)  # three of 11 kB
    for index, key in enumerate(("a", "b", "c")):
        assert cache.keep(key, recorded(index), {}) is None
        os.utime(files(tmp_path)[-1], (1000 + index, 1000 + index))
    assert cache.find("a")[0] is not None  # used again: now the most recent
    assert cache.keep("d", recorded(3), {}) is None
    assert [path.name[0] for path in files(tmp_path)] == ["a", "c", "d"]
    assert total(tmp_path) <= cache.most_bytes
    assert cache.find("b") == (None, None)
    assert ActivationCache(tmp_path, 12_000).keep("e", recorded(4), {}) is None
    assert [path.name[0] for path in files(tmp_path)] == ["e"]


def test_more_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    note = ActivationCache(tmp_path, 9000).keep("a", recorded(most=9000), {})
    assert note is not None
    assert "take more than --cache-size (9,000 bytes)" in note
    note = ActivationCache(tmp_path, 9700).keep("a", recorded(most=9700), {})  # the numbers fit, the file does not
    assert note is not None
    assert files(tmp_path) == []
    assert list(tmp_path.glob("*.new")) == []


def test_many_writers_stay_within_the_bound(tmp_path: Path) -> None:
    cache, notes, totals = ActivationCache(tmp_path, 35_000), [], []
    over = threading.Event()

    def write(name: str) -> None:
        for index in range(6):
            notes.append(cache.keep(f"{name}{index}", recorded(index), {}))
            notes.append(cache.find(f"{name}{index}")[1])

    def look() -> None:
        while not over.is_set():
            sizes = []
            for path in files(tmp_path):
                with suppress(FileNotFoundError):  # made room since it was listed
                    sizes.append(path.stat().st_size)
            totals.append(sum(sizes))

    watcher = threading.Thread(target=look)
    writers = [threading.Thread(target=write, args=(name,)) for name in "wxyz"]
    for thread in writers:
        thread.start()
    watcher.start()
    for thread in writers:
        thread.join()
    over.set()
    watcher.join()
    assert set(notes) == {None}
    assert len(files(tmp_path)) == 3
    assert total(tmp_path) <= cache.most_bytes
    assert list(tmp_path.glob("*.new")) == []


def test_what_a_killed_worker_left_is_never_read_and_goes_after_a_day(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, 10**6)
    young, old = tmp_path / "a.host-1.new", tmp_path / "a.host-2.new"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert cache.find("a") == (None, None)
    assert cache.keep("a", recorded(), {}) is None
    assert (young.exists(), old.exists()) == (True, False)


def test_a_file_removed_while_it_is_read_is_still_read(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path, 10**6)
    cache.keep("a", recorded(), {})
    kept, _ = cache.find("a")
    assert kept is not None
    files(tmp_path)[0].unlink()

    class Rows:
        def tokens(self, start: int, stop: int) -> Any:
            ids = torch.ones(stop - start, 3, dtype=torch.int64)
            return ForwardBatch(ids, ids, ids.bool(), ids)

    generator = torch.Generator().manual_seed(0)
    for batch in kept.batches(Rows(), "cpu"):  # type: ignore[arg-type]
        assert batch.hidden is not None
        for layer in batch.hidden:
            expected = torch.randn(4, 3, 100, generator=generator)
            assert torch.equal(layer[:, 1], expected[:, 1])
            assert layer[:, [0, 2]].isnan().all()  # never a number that nobody computed


def test_a_folder_that_cannot_be_written_costs_the_cache_not_the_run(series: SmallSeries, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    summary = run(series, tmp_path / "s.duckdb", ("geometry",), cache=str(tmp_path / "file"))
    assert summary.exit_code == 0
    assert any("cannot be written" in text and "the run goes on without it" in text for text in summary.warnings)


def test_a_network_is_opened_late_once_and_only_when_asked() -> None:
    opened = []

    def load() -> Any:
        opened.append(1)
        return torch.nn.Linear(2, 3)

    kept = Kept(None, Places(), 5, {})
    model: Any = LazyModel(kept, "cpu", "float32", load)
    assert (model.n_layers, model.device, model.dtype, opened) == (5, "cpu", "float32", [])
    assert (model.out_features, model.in_features, opened) == (3, 2, [1])


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("20GB", 20 * 10**9), ("1.5 MiB", 1572864), ("7", 7), ("12b", 12), ("3tb", 3 * 10**12)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1", "5 apples", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--cache-size: expected a size such as 20GB, 500MB or 2GiB; found"):
        parse_size(text)


def test_where_the_cache_is(tmp_path: Path) -> None:
    store = tmp_path / "history.duckdb"
    beside = tmp_path / "history.cache"
    assert cache_folder(None, None, store) is None
    assert cache_folder("off", "1GB", store) is None
    assert cache_folder("auto", None, store) == beside
    assert cache_folder(None, "1GB", store) == beside
    assert cache_folder(str(tmp_path / "shared"), None, store) == tmp_path / "shared"


def test_options_from_a_file_are_checked_and_recorded(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('cache = "kept"\ncache_size = "2GB"\n')
    merged, _ = merge_settings({"cache_size": "3GB"}, [], read_config(config))
    options = AnalyzeOptions("run", tmp_path, tmp_path / "s.duckdb", **merged)
    assert options.stored()["cache"] == str(Path("kept").absolute())
    assert options.stored()["cache_size"] == "3GB"
    with pytest.raises(UsageError, match="--cache-size"):
        AnalyzeOptions("run", tmp_path, tmp_path / "s.duckdb", cache_size="many").check()


@pytest.mark.slow
def test_probes_from_the_cache_are_the_same_probes(
    series: SmallSeries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache": str(tmp_path / "cache")}
    assert run(series, tmp_path / "plain.duckdb", PROBES).exit_code == 0
    assert run(series, tmp_path / "cached.duckdb", PROBES, **cache).exit_code == 0
    monkeypatch.setattr("trace_offline.checkpoints.loading.load_model", None)
    assert run(series, tmp_path / "served.duckdb", PROBES, **cache).exit_code == 0
    plain = numbers(tmp_path / "plain.duckdb")
    assert numbers(tmp_path / "cached.duckdb") == plain
    assert numbers(tmp_path / "served.duckdb") == plain


@pytest.mark.slow
def test_workers_share_the_cache(series: SmallSeries, tmp_path: Path) -> None:
    options: dict[str, Any] = {"analyzers": ("geometry",), "params": {"geometry": PARAMS["geometry"]}, "jobs": 2}
    assert analyze(series.run, series.evaluation, tmp_path / "a.duckdb", cache="auto", **options).exit_code == 0
    cached = tmp_path / "a.cache"
    assert len(files(cached)) == 2
    shared = {**options, "cache": str(cached)}
    assert analyze(series.run, series.evaluation, tmp_path / "b.duckdb", **shared).exit_code == 0
    assert analyze(series.run, series.evaluation, tmp_path / "plain.duckdb", **options).exit_code == 0
    assert numbers(tmp_path / "a.duckdb") == numbers(tmp_path / "b.duckdb") == numbers(tmp_path / "plain.duckdb")
