"""Small checkpoint folders for tests of discovery, written without any model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 8}
NOW = 2_000_000_000.0
"""The time of the search in tests; files are made to look old unless said otherwise."""


def weights(seed: int, size: int = 32) -> dict[str, np.ndarray]:
    """Two tensors that depend on the seed."""
    generator = np.random.default_rng(seed)
    return {
        "embed.weight": generator.standard_normal((size, 8)).astype(np.float32),
        "head.weight": generator.standard_normal((8, size)).astype(np.float32),
    }


def hf_folder(path: Path, seed: int, **config: object) -> Path:
    """config.json and model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights(seed), path / "model.safetensors")
    return path


def trainer_folder(path: Path, seed: int, step: int, **state: object) -> Path:
    """A folder as the HF Trainer leaves it, trainer_state.json last."""
    hf_folder(path, seed)
    (path / "optimizer.pt").write_bytes(b"optimizer")
    (path / "scheduler.pt").write_bytes(b"scheduler")
    facts = {"epoch": 0.5, "global_step": step, "log_history": [], "max_steps": 100, "num_input_tokens_seen": 0}
    (path / "trainer_state.json").write_text(json.dumps({**facts, **state}, indent=2, sort_keys=True))
    return path


def tokenizer(path: Path) -> None:
    """A file that makes the folder one with a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text("{}")


def aged(path: Path, seconds: float = 3600) -> Path:
    """Set the times of everything below to ``seconds`` before NOW."""
    for folder, _, names in os.walk(path):
        for name in names:
            os.utime(Path(folder) / name, (NOW - seconds, NOW - seconds), follow_symlinks=False)
    if path.is_file():
        os.utime(path, (NOW - seconds, NOW - seconds))
    return path
