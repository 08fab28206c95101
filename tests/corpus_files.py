"""Corpus files of every form, written by hand from the description of the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from trace_offline.corpus.forms import Argument, PlainSentence

RUN = CliRunner()

# Files as ABSynth writes them, by hand from a description of its formats.
FULL_RECORD = {
    "sentence": "noun271 motion_verb19s preposition5 location108 preposition10 location141",
    "semantic_roles": {
        "arg0": {"word": "noun271", "role": "Theme", "position": 0},
        "arg1": {"word": "location108", "role": "Source", "position": 3},
        "arg2": {"word": "location141", "role": "Goal", "position": 5},
    },
    "semantics": "∃e.motion(e) ∧ Theme(e, noun271) ∧ Source(e, location108) ∧ Goal(e, location141)",
    "linguistic_annotations": {
        "pos_tags": ["NN", "VB", "IN", "NN", "IN", "NN"],
        "semantic_roles": {"noun271": "Theme", "location108": "Source", "location141": "Goal"},
        "formal_semantics": "λx0 x3 x5.∃e.motion(e) ∧ Theme(x0) ∧ Source(x3) ∧ Goal(x5)",
    },
    "metadata": {
        "complexity": "medium",
        "frame": "motion",
        "template": {
            "frame": "motion",
            "args": ["arg0", "verb", "prep", "arg1", "prep", "arg2"],
            "roles": {"arg0": "Theme", "arg1": "Source", "arg2": "Goal"},
            "weight": 0.15,
        },
        "length": 6,
        "entropy_profile": [9.434, 9.43, 9.432, 9.438, 9.431, 9.433],
        "avg_entropy": 9.433,
    },
    "corpus_metadata": {"target_frame": "transitive_action", "sentence_id": 994},
}
TIMED = {
    "sentence": "temporal11 noun248 transitive_verb8s noun248",
    "semantic_roles": {
        "arg_time": {"word": "temporal11", "role": "Time", "position": 0},
        "arg0": {"word": "noun248", "role": "Agent", "position": 1},
        "arg1": {"word": "noun248", "role": "Patient", "position": 3},
    },
    "semantics": "∃e.temporal_action(e) ∧ Time(e, temporal11) ∧ Agent(e, noun248) ∧ Patient(e, noun248)",
}
BY_HAND: dict[str, Any] = {
    "absynth": {
        "corpus": [FULL_RECORD],
        "metadata": {"generation_params": {"num_sentences": 1}, "template_usage": {}},
        "statistics": {},
    },
    "semantic_annotations": [TIMED | {"frame": "temporal_action"}],
    "sentences_only": ["noun44 transitive_verb34s noun210", "noun3 intransitive_verb2s"],
    "v1": [
        {
            "sentence": "noun1781 TRANSITIVE_VERB8 noun1597 preposition59 location594",
            "semantics": "∃e (Agent(e, noun1781) ∧ Patient(e, noun1597))",
        }
    ],
}
READ = {
    "absynth": [
        PlainSentence(
            ("noun271", "motion_verb19s", "preposition5", "location108", "preposition10", "location141"),
            ("NN", "VB", "IN", "NN", "IN", "NN"),
            (Argument("Theme", "noun271", 0), Argument("Source", "location108", 3), Argument("Goal", "location141", 5)),
            "motion",
            "medium",
        )
    ],
    "semantic_annotations": [
        PlainSentence(
            ("temporal11", "noun248", "transitive_verb8s", "noun248"),
            None,
            (Argument("Time", "temporal11", 0), Argument("Agent", "noun248", 1), Argument("Patient", "noun248", 3)),
            "temporal_action",
        )
    ],
    "sentences_only": [
        PlainSentence(("noun44", "transitive_verb34s", "noun210")),
        PlainSentence(("noun3", "intransitive_verb2s")),
    ],
    "v1": [
        PlainSentence(
            ("noun1781", "TRANSITIVE_VERB8", "noun1597", "preposition59", "location594"),
            arguments=(Argument("Agent", "noun1781", None), Argument("Patient", "noun1597", None)),
        )
    ],
}
# What an evaluation set has to hold: (task, word, label).
LABELS = {
    "absynth": {("role", "noun271", "Theme"), ("role", "location141", "Goal"), ("pos", "motion_verb19s", "VB")},
    "semantic_annotations": {("role", "temporal11", "Time"), ("role", "noun248", "Patient")},
    "sentences_only": set(),
    "v1": {("role", "noun1781", "Agent"), ("role", "noun1597", "Patient")},
}


def write(path: Path, content: Any, **how: Any) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False, **how), encoding="utf-8")
    return path
