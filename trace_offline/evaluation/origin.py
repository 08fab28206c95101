"""Where the text of an evaluation set comes from, when a generator made it, and how to read its tokens as text.

A file of ``trace_offline.corpus`` has its parameters beside it, in ``FILE.params.json``; a set built from it keeps them
(``corpus`` in ``evaluation_set.json``: ``params``, and ``seed`` and ``sentences`` when there is one such file), and the
tokenizer with which it was made (``tokenizer.json``), so that what a model samples can be held against the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_offline.core.errors import EvaluationSetError

TOKENIZER = "tokenizer.json"


def corpus_record(given: Any, where: str) -> dict[str, Any] | None:
    """``{"params": …}`` with ``seed`` and ``sentences`` if known, from what a caller gives.

    ``given``: such a record, bare parameters (``CorpusParams.to_record()``), a ``CorpusParams`` or ``Origin``, or None.
    Raises EvaluationSetError for anything else.
    """
    if given is None:
        return None
    record = given.to_record() if hasattr(given, "to_record") else given
    if all(hasattr(given, name) for name in ("seed", "sentences", "params")):
        record = {"seed": given.seed, "sentences": given.sentences, "params": given.params.to_record()}
    if isinstance(record, Mapping):
        record = dict(record) if "params" in record else {"params": dict(record)}
        numbers = [record[name] for name in ("seed", "sentences") if name in record]
        if isinstance(record["params"], Mapping) and all(type(number) is int for number in numbers):
            try:
                json.dumps(record, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise EvaluationSetError(f"{where}: corpus holds what JSON cannot ({error}).") from error
            return record
    raise EvaluationSetError(
        f"{where}: corpus must be the parameters of a synthetic corpus (CorpusParams or its to_record()), or an object "
        f"with params, seed and sentences; found {given!r:.80}."
    )


def corpus_of_files(paths: Sequence[Path]) -> tuple[dict[str, Any] | None, str | None]:
    """The record of the corpus behind the files, from the ``.params.json`` beside them; and a warning, or None.

    None when no file has one, and, with a warning, when their parameters differ. Raises EvaluationSetError for a file
    that holds something else.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        beside = path.with_name(f"{path.name}.params.json")
        if not beside.is_file():
            continue
        try:
            record = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationSetError(f"{beside}: cannot be read as JSON ({error}). Remove it or restore it.") from error
        checked = corpus_record(record, str(beside))
        if checked is not None:
            found.append(checked)
    if not found:
        return None, None
    if any(record["params"] != found[0]["params"] for record in found):
        return None, "the files come from corpora with different parameters, so no grammar is kept with the set."
    return (found[0] if len(found) == 1 else {"params": found[0]["params"]}), None


def tokenizer_json(tokenizer: Any) -> str | None:
    """A fast tokenizer of transformers or tokenizers as the text of its ``tokenizer.json``; None for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    return str(backend.to_str()) if hasattr(backend, "to_str") else None


class Decoder:
    """The tokenizer of an evaluation set, from token ids back to text."""

    def __init__(self, folder: Path) -> None:
        """Raises EvaluationSetError when the file is missing or is no tokenizer."""
        from tokenizers import Tokenizer

        path = folder / TOKENIZER
        try:
            text = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(text)
        except FileNotFoundError as error:
            raise EvaluationSetError(f"{path}: missing. Build the evaluation set anew.") from error
        except Exception as error:  # whatever the parser of the library raises
            raise EvaluationSetError(f"{path}: cannot be read as a tokenizer ({error}).") from error
        unknown = json.loads(text).get("model", {}).get("unk_token")
        self.unknown_id: int | None = self._tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """One text a row of ids, special tokens written out."""
        return list(self._tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=False))
