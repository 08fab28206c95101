"""A configuration that transformers reads wrongly is refused, not computed with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import gpt_neox, llama_gqa

from trace_offline import CheckpointError
from trace_offline.checkpoints.rotary import refuse_changed_rotary


@pytest.mark.parametrize("make", [gpt_neox, llama_gqa])
def test_rotary_parameters_must_arrive(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    model.save_pretrained(tmp_path)
    refuse_changed_rotary(model, tmp_path / "config.json")
    model.config.rope_parameters["rope_theta"] = 123.0
    with pytest.raises(CheckpointError, match=r"rope_parameters.rope_theta is 10000.0.*made it 123.0.*--upgrade"):
        refuse_changed_rotary(model, tmp_path / "config.json")


def test_a_model_without_rotary_positions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refuse_changed_rotary(gpt_neox(), tmp_path / "config.json")
