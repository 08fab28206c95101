"""Shared fixtures. Real data is used when present beside the checkout; tests that need it say why they skip."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest


def shared_data(*parts: str) -> Path:
    """Path inside the real-data folder, or skip the test with the reason."""
    root = Path(os.environ.get("TRACE_OFFLINE_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs real data at {'/'.join(parts) or 'its root'}; set TRACE_OFFLINE_SHARED_DATA to the folder")
    return path


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """The trained 260k-parameter English model in Hugging Face format."""
    return shared_data("stories260K_hf")


@dataclass(frozen=True)
class SmallSeries:
    """A folder of tiny checkpoints (steps 0, 1, 2 and 4, the last two with equal weights) and its evaluation set."""

    run: Path
    evaluation: Path


@pytest.fixture(scope="session")
def small_series(tmp_path_factory: pytest.TempPathFactory) -> SmallSeries:
    """Four GPT-NeoX checkpoints of a few thousand parameters on 40 annotated sequences."""
    import torch
    from tiny_models import gpt_neox

    from trace_offline.recording import save_checkpoint, save_evaluation_set

    root = tmp_path_factory.mktemp("series")
    model = gpt_neox()
    generator = torch.Generator().manual_seed(0)
    for step in (0, 1, 2, 4):
        if step in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        save_checkpoint(model, root / "run", step, tokens_seen=1000 * step)
    ids = torch.randint(3, model.config.vocab_size, (40, 14), generator=generator)
    words = [(row, "parity", t, t + 1, "odd" if ids[row, t] % 2 else "even") for row in range(40) for t in range(14)]
    save_evaluation_set(root / "evaluation", ids, annotations=words, name="small")
    return SmallSeries(root / "run", root / "evaluation")


def measured(store: Path, analyzer: str) -> list[int]:
    """Steps with a number of the analyzer, in order."""
    from trace_offline import Store

    sql = "select distinct step from history where analyzer = ? order by step"
    found: list[int] = Store.open(store).sql(sql, [analyzer]).column(0).to_pylist()
    return found
