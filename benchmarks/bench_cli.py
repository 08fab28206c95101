"""What a user waits for before anything is computed: --help, discovery of 1,000 folders, a run with nothing to do."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import median_seconds, result, save, versions

ROOT = Path(__file__).parents[1]


def command(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "trace_offline.cli.main", *map(str, arguments)], check=True, capture_output=True
    )


def thousand_checkpoints(folder: Path) -> None:
    """1,000 step folders with a configuration, 148 small tensors each, as a Pythia-70m has, all different."""
    tensors = [f"gpt_neox.layers.{i}.weight_{j}" for i in range(6) for j in range(24)] + ["a", "b", "c", "d"]
    size = 256
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for number, name in enumerate(tensors):
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [number * size, (number + 1) * size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for step in range(1000):
        place = folder / f"step{step * 1000}"
        place.mkdir()
        (place / "config.json").write_text('{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}')
        data = step.to_bytes(4, "little") * (len(tensors) * size // 4)
        (place / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def main() -> int:
    rows = []
    where = {"versions": versions("typer", "torch", "transformers")}
    rows.append(result("--help", median_seconds(lambda: command("--help")), "s", limit=0.5, **where))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = folder / "runs"
        runs.mkdir()
        thousand_checkpoints(runs)
        found = median_seconds(lambda: command("discover", runs, "--json"))
        rows.append(result("discover 1,000 checkpoints", found, "s", limit=2.0, **where))
        data = ROOT / "data"
        analyze = ("analyze", data / "tiny_series", "--evaluation-set", data / "tiny_evaluation", "--store",
                   folder / "s.duckdb")  # fmt: skip
        first = median_seconds(lambda: command(*analyze), repeats=1, warmup=0)
        rows.append(result("five analyzers on the shipped series", first, "s", limit=180.0, checkpoints=14, **where))
        rows.append(
            result("the same again: nothing to do", median_seconds(lambda: command(*analyze)), "s", limit=3.0, **where)
        )
    save("cli", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
