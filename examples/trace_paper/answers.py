"""The four questions, and how their answers are worded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ANSWERS = {
    "yes": "Yes",
    "no": "No",
    "mixed": "It depends on what is compared",
    "not shown": "Not shown",
    "no turn": "There is no turn to precede",
}
QUESTIONS = {
    "syntax_before_roles": "Is syntax earlier than roles?",
    "dimension_falls_and_rises": "Does intrinsic dimension fall and rise?",
    "curvature_peaks_early": "Does curvature peak early and decay?",
    "peak_before_turn": "Does the peak precede the turn?",
}


def groups(results: Mapping[str, Any]) -> list[str]:
    """The groups that were judged: one for each number of layers, and all runs where there are several."""
    found = [name for name in results["claims"] if name != "all runs"]
    return found + (["all runs"] if len(found) > 1 else [])


def verdicts(results: Mapping[str, Any], claim: str) -> str:
    """The answer to one question for every group, in bold."""
    said = [f"{ANSWERS[results['claims'][group][claim]['verdict']]} ({group})" for group in groups(results)]
    return "**" + "; ".join(said) + ".**"
