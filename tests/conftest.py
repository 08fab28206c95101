"""Shared fixtures. Real data is used when present beside the checkout; tests that need it say why they skip."""

from __future__ import annotations

import os
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
