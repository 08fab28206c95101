"""Step, tokens seen, stage, epoch and seed from the names people give to checkpoints.

Names covered: Hugging Face Trainer, Pythia, OLMo 1 and 2, SmolLM3, LLM360, BLOOM, MultiBERTs, Megatron, DeepSpeed,
Lightning, accelerate, MosaicML and plain numbered files. Numbers are compared as numbers, never as text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
# At most 18 digits: what fits the store's 64-bit column; longer ones are hashes, not counts.
_NUMBER = r"(\d{1,18}(?:\.\d{1,9})?)"
_LARGEST = 2**63 - 1
_WEIGHT_SUFFIX = re.compile(r"\.(?:pt|pth|ckpt|safetensors|bin|json|pkl|tar|gguf|incomplete|tmp|part)$", re.IGNORECASE)
# "global_step500", "step=500", "model.iter_126360", "step-40000", "step_20k", "ep0-ba1000"
_STEP = re.compile(
    rf"(?<![a-z])(?P<word>(?:global|training|train|opt|long)?[-_]?step|steps|iter(?:ation)?s?|updates?|batch|ba)"
    rf"[-_=]?{_NUMBER}([kmb]?)(?![a-z0-9])"
)
_STEP_AFTER = re.compile(rf"(?<![a-z0-9.]){_NUMBER}([kmb]?)[-_]?(?:steps?|iters?|iterations?)(?![a-z0-9])")
_CHECKPOINT = re.compile(r"(?<![a-z])(?:checkpoint|ckpt|chkpt)[-_=]?(\d{1,18})([kmb]?)(?![a-z0-9.])")
_TOKENS = re.compile(rf"(?<![a-z])(?:tokens?|tok)[-_=]?{_NUMBER}([kmbt]?)(?![a-z0-9])")
_TOKENS_AFTER = re.compile(rf"(?<![a-z0-9.]){_NUMBER}([kmbt]?)[-_]?(?:tokens?|toks?)(?![a-z0-9])")
_EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)[-_=]?(\d{1,18}(?:\.\d{1,9})?)(?![a-z0-9])")
_STAGE = re.compile(r"(?<![a-z])stage[-_=]?(\d{1,9})(?:[-_](ingredient[-_=]?\d{1,9}))?(?![a-z0-9])")
_SEED = re.compile(r"(?<![a-z])seed[-_=]?(\d{1,18})(?![a-z0-9])")
_BARE = re.compile(r"\d{1,18}")
_LEADING = re.compile(r"(\d{1,18})[-_](?!of[-_])")
_TRAILING = re.compile(r"(?:[-_.=]|^(?:model|weights?|params|net|network|snapshot|state))(\d{1,18})$")
# Numbers that never order a series: run versions, ranks, shards, dates, metric values, seeds, stages.
_NOISE = re.compile(
    r"(?<![a-z0-9])v?\d+(?:\.\d+)+|\d{4}-\d{2}-\d{2}|\d{5}-of-\d{5}|(?<![a-z])(?:version|rank|seed|stage|ingredient|gpu|node|part|run|v)[-_=]?\d+"
    r"|(?:loss|acc|accuracy|ppl|perplexity|metric|score|f1|bleu|lr|mse)[-_=]?-?\d+(?:\.\d+)?(?:e-?\d+)?"
)


class StepSource(StrEnum):
    """Which kind of number the step was taken from."""

    STEP = "step"
    CHECKPOINT = "checkpoint"
    EPOCH = "epoch"
    INDEX = "index"
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class ParsedName:
    """What a name says. ``note`` is set when ``step`` is not literally a training step (an epoch, an index)."""

    step: int | None = None
    tokens_seen: int | None = None
    stage: str | None = None
    epoch: float | None = None
    seed: int | None = None
    source: StepSource | None = None
    note: str | None = None


def _scaled(number: str, unit: str) -> int | None:
    """``("1.5", "k")`` → 1500; None when that is no whole number (0.5 steps name nothing)."""
    # Exact integer arithmetic: a floating-point product need not be the whole number that the name means.
    whole, _, fraction = number.partition(".")
    value, rest = divmod(int(whole + fraction) * _UNITS[unit], 10 ** len(fraction))
    return value if rest == 0 and value <= _LARGEST else None


def parse_name(name: str, *, bare_numbers: bool = True) -> ParsedName:
    """Parse one folder, file, ref or repository name (a ``pr/1`` or ``org/repo`` is read as a whole).

    ``bare_numbers=False`` ignores numbers without a word that says what they count: for ancestor folders and
    repository names, where they are sizes or versions more often than steps.
    """
    text = name.strip().lower()
    while found := _WEIGHT_SUFFIX.search(text):
        text = text[: found.start()]
    text = re.sub(r"-v\d+$", "", text)  # Lightning's suffix for a name that was already taken
    stage = _STAGE.search(text)
    seed = _SEED.search(text)
    epoch = _EPOCH.search(text)
    tokens = _TOKENS.search(text) or _TOKENS_AFTER.search(text)
    step, source, note = _step(text, epoch.group(1) if epoch else None, bare_numbers=bare_numbers)
    return ParsedName(
        step=step,
        tokens_seen=_scaled(tokens.group(1), tokens.group(2)) if tokens else None,
        stage=(f"stage{int(stage[1])}" + (f"-{stage[2]}" if stage[2] else "")) if stage else None,
        epoch=float(epoch.group(1)) if epoch else None,
        seed=int(seed.group(1)) if seed else None,
        source=source,
        note=note,
    )


def _step(text: str, epoch: str | None, *, bare_numbers: bool) -> tuple[int | None, StepSource | None, str | None]:
    if found := _STEP.search(text):
        return _scaled(found.group(2), found.group(3)), StepSource.STEP, None
    if found := _STEP_AFTER.search(text):
        return _scaled(found.group(1), found.group(2)), StepSource.STEP, None
    if found := _CHECKPOINT.search(text):
        digits = found.group(1)
        if len(digits) > 1 and len(digits) <= 3 and digits.startswith("0"):
            return int(digits), StepSource.INDEX, _note("an index", digits)
        return _scaled(digits, found.group(2)), StepSource.CHECKPOINT, None
    if epoch is not None:
        value = float(epoch)
        if value.is_integer():
            return int(value), StepSource.EPOCH, _note("an epoch", epoch)
        return None, None, None
    if not bare_numbers:
        return None, None, None
    if _BARE.fullmatch(text):
        return int(text), StepSource.NUMBER, None
    rest = _NOISE.sub("#", text)
    if found := _LEADING.match(rest):
        return int(found.group(1)), StepSource.NUMBER, _note("a number", found.group(1))
    if found := _TRAILING.search(rest):
        return int(found.group(1)), StepSource.NUMBER, _note("a number", found.group(1))
    return None, None, None


def _note(what: str, text: str) -> str:
    return f"The name gives {what} ({text}), no step; it orders the series and is shown as the step."


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which digits count as numbers: ``ckpt-9`` before ``ckpt-10``, whatever the zero padding."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts if part)
