"""Reading the result files of lm-evaluation-harness, of its first releases (0.2, 0.3) and of today's (0.4).

Old: ``results[task]["acc"]``, ``["acc_stderr"]``. New: ``results[task]["acc,none"]``, ``["acc_stderr,none"]``, with the
filter after the comma. Neither has a field for the training step: it is read from ``revision=step512`` in the recorded
model arguments, from a checkpoint folder given as the model (``pretrained=run/checkpoint-500``), or from the name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trace_offline.checkpoints.naming import parse_name
from trace_offline.core.errors import UsageError
from trace_offline.core.types import Measurement


@dataclass(frozen=True)
class TaskResult:
    """The numbers of one task: ``measurements`` in the order of the file, ``version`` of the task as recorded."""

    task: str
    measurements: tuple[Measurement, ...]
    num_fewshot: int | None
    version: str | None


@dataclass(frozen=True)
class ResultFile:
    """One result file: which model at which step, measured by which release, and the numbers of each task."""

    path: Path
    model: str | None
    revision: str | None
    step: int
    run: str | None
    harness: str
    tasks: tuple[TaskResult, ...]
    limit: float | None = None
    dtype: str | None = None
    device: str | None = None
    seed: int = 0


def expand(paths: Iterable[Path]) -> list[Path]:
    """Files as given; of a folder every ``.json`` below it, by name. Raises UsageError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*.json") if item.is_file())
            if not inside:
                raise UsageError(f"{path}: expected result files of lm-evaluation-harness, found no .json file in it.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"{path}: no such file. Expected the result files of lm-evaluation-harness (.json).")
    return found


def read_results(path: Path, *, step: int | None = None) -> ResultFile:
    """Parse one file; ``step`` overrides what it says. Raises UsageError when it is no result file or has no step."""
    content = _load(path)
    results = content.get("results")
    if not isinstance(results, dict) or not results:
        keys = ", ".join(list(content)[:6]) or "none"
        raise UsageError(
            f'{path}: expected a result file of lm-evaluation-harness with a table "results", found the keys: {keys}.'
        )
    config = content["config"] if isinstance(content.get("config"), dict) else {}
    arguments = _arguments(config.get("model_args"))
    model = arguments.get("pretrained") or _text(content.get("model_name")) or arguments.get("path")
    revision = arguments.get("revision") or _text(config.get("model_revision"))
    if step is None:
        step = _step(path, model, revision)
    tasks = tuple(_tasks(path, content, results, config))
    if not tasks:
        raise UsageError(f'{path}: the table "results" has no number in it; was the evaluation interrupted?')
    harness = _text(content.get("lm_eval_version")) or _text(content.get("git_hash")) or "unknown"
    limit, seed = config.get("limit"), config.get("random_seed")
    return ResultFile(
        path=path,
        model=model,
        revision=revision,
        step=step,
        run=_run(model),
        harness=harness,
        tasks=tasks,
        limit=_finite(limit),
        dtype=(_text(config.get("model_dtype")) or arguments.get("dtype") or "").removeprefix("torch.") or None,
        device=_text(config.get("device")),
        seed=seed if isinstance(seed, int) else 0,
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text: {error}.") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}: expected JSON, found something else at line {error.lineno}: {error.msg}. Is the file complete?"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f'{path}: expected a JSON object with a table "results", found {type(content).__name__}.')
    return content


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _arguments(given: object) -> dict[str, str]:
    """``"pretrained=a/b,revision=step1"``, or the same as a table, → names and values."""
    if isinstance(given, Mapping):
        return {str(key): str(value) for key, value in given.items() if value is not None}
    if not isinstance(given, str):
        return {}
    pairs = (part.partition("=") for part in given.split(","))
    return {name.strip(): value.strip() for name, sign, value in pairs if sign}


def _step(path: Path, model: str | None, revision: str | None) -> int:
    places = [
        (revision, False),
        (PurePosixPath(model).name if model else None, False),
        (path.stem, False),
        (path.parent.name, False),
    ]
    for text, bare in places:
        step = parse_name(text, bare_numbers=bare).step if text else None
        if step is not None:
            return step
    recorded = f'revision "{revision}"' if revision else "no revision"
    raise UsageError(
        f"{path}: no training step: expected revision=step… among the recorded model arguments, or a name such as "
        f'step512.json; found {recorded}, model "{model}". Say it with --step N (one file at a time).'
    )


def _run(model: str | None) -> str | None:
    """The model's name without its owner; the folder above where the name is that of a checkpoint."""
    if not model:
        return None
    parts = [part for part in PurePosixPath(model).parts if part != "/"]
    while len(parts) > 1 and parse_name(parts[-1], bare_numbers=False).step is not None:
        parts.pop()
    return parts[-1] if parts else None


def _tasks(
    path: Path, content: Mapping[str, Any], results: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[TaskResult]:
    for task, numbers in results.items():
        if not isinstance(numbers, dict):
            raise UsageError(f'{path}: expected a table of numbers for task "{task}", found {numbers!r}.')
        fewshot = _of_task(content, "n-shot", task, config.get("num_fewshot"))
        samples = _of_task(content, "n-samples", task)
        n = samples.get("effective") if isinstance(samples, dict) else None
        measurements = tuple(_measurements(task, numbers, n if isinstance(n, int) else None))
        version = _of_task(content, "versions", task)
        if measurements:  # a group of tasks without a number of its own has only an alias
            yield TaskResult(
                task=task,
                measurements=measurements,
                num_fewshot=fewshot if isinstance(fewshot, int) else None,
                version=str(version) if isinstance(version, int | float | str) else None,
            )


def _of_task(content: Mapping[str, Any], table: str, task: str, default: Any = None) -> Any:
    found = content.get(table)
    value = found.get(task) if isinstance(found, dict) else None
    return default if value is None else value


def _measurements(task: str, numbers: Mapping[str, Any], n: int | None) -> Iterator[Measurement]:
    """Each metric with its stderr; a filter other than "none" becomes the label."""
    for key, value in numbers.items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr") or metric in ("sample_len", "alias") or not (_is_number(value) or value is None):
            continue
        stderr = numbers.get(f"{metric}_stderr,{chosen}" if chosen else f"{metric}_stderr")
        number = _finite(value)
        finite, error = number is not None, _finite(stderr)
        yield Measurement(
            metric=metric,
            value=number,
            stderr=error if finite and error is not None and error >= 0 else None,
            n=n,
            task=task,
            label=chosen if chosen and chosen != "none" else None,
            reason=None if finite else f"lm-evaluation-harness recorded {value} for this metric",
        )
