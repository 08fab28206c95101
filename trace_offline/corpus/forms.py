"""Corpus files in five forms: our own JSONL and the four JSON forms of ABSynth.

- ``jsonl``: one line a sentence, one list per annotation; carries everything.
- ``absynth``: records of a "full" file ``{"corpus": […], "metadata": {…}}``; carries part of speech (Penn tags), roles
  by position, frame and complexity.
- ``semantic_annotations``: ``{sentence, semantic_roles, semantics, frame}`` in a list; roles by position, frame.
- ``sentences_only``: strings in a list.
- ``v1``: ``{sentence, semantics}`` in a list; roles by word, inside a formula.

Only what a form is known to carry is written and read; :func:`carried` says what that is for a sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trace_offline.core.errors import UsageError, nearest
from trace_offline.corpus.grammar import COMPLEXITIES
from trace_offline.corpus.params import Origin
from trace_offline.corpus.sentence import AnnotatedSentence, complete_file, read_jsonl

FORMS: tuple[str, ...] = ("jsonl", "absynth", "semantic_annotations", "sentences_only", "v1")

_PENN = {
    "ADJ": "JJ", "ADP": "IN", "ADV": "RB", "CCONJ": "CC", "DET": "DT", "NOUN": "NN", "PRON": "WDT", "SCONJ": "IN",
    "VERB": "VB",
}  # fmt: skip
_SLOTS = {"JJ": "adj", "IN": "prep", "RB": "adv", "CC": "conj", "DT": "det", "NN": "noun", "VB": "verb", "WDT": "rel"}
_FORMULA = re.compile(r"(\w+)\(\s*e\d*\s*,\s*([^()\s]+)\s*\)")
_EVENT = re.compile(r"∃\s*e\d*\s*\.\s*(\w+)\(")


@dataclass(frozen=True, slots=True)
class Argument:
    """A role and the word that bears it; ``position`` is None where a form names the word only."""

    role: str
    word: str
    position: int | None


@dataclass(frozen=True, slots=True)
class PlainSentence:
    """A sentence as an ABSynth form carries it; None for what the form does not say."""

    words: tuple[str, ...]
    pos: tuple[str, ...] | None = None
    arguments: tuple[Argument, ...] | None = None
    frame: str | None = None
    complexity: str | None = None

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(self.words)


Sentence = AnnotatedSentence | PlainSentence


def penn_tag(sentence: AnnotatedSentence, position: int) -> str:
    """The Penn tag of a word as ABSynth gives it: NN for every noun, VB for every verb; VBZ or VBP for *is*, *are*."""
    tag = sentence.pos[position]
    if tag == "AUX":
        return "VBP" if sentence.plural[position] else "VBZ"
    return _PENN[tag]


def carried(sentence: Sentence, form: str) -> Sentence:
    """What ``form`` carries of a sentence: reading a written sentence gives exactly this.

    Raises UsageError for an unknown form, and for ``jsonl`` and a sentence that another form has already made poorer.
    """
    _check_form(form)
    if form == "jsonl":
        if not isinstance(sentence, AnnotatedSentence):
            raise UsageError(
                "jsonl: expected sentences with all annotations; those of the ABSynth forms lack lemmas, number and "
                "clauses. Write them in one of the other forms."
            )
        return sentence
    if isinstance(sentence, AnnotatedSentence):
        roles = enumerate(sentence.roles)
        sentence = PlainSentence(
            sentence.words,
            tuple(penn_tag(sentence, i) for i in range(len(sentence.words))),
            tuple(Argument(role, sentence.words[i], i) for i, role in roles if role is not None),
            sentence.frame,
            sentence.complexity,
        )
    if form == "absynth":
        return sentence
    if form == "semantic_annotations":
        return replace(sentence, pos=None, complexity=None)
    if form == "sentences_only":
        return PlainSentence(sentence.words)
    arguments = sentence.arguments
    if arguments is not None:
        arguments = tuple(replace(each, position=None) for each in arguments)
    return PlainSentence(sentence.words, arguments=arguments)


def write_corpus(
    path: Path | str, sentences: Iterable[Sentence], form: str = "jsonl", *, origin: Origin | None = None
) -> int:
    """Write sentences in one of :data:`FORMS`, one at a time, and return their number.

    ``origin`` goes into the metadata of a full ABSynth file. The file appears under its name only when complete.
    Raises UsageError for an unknown form and for sentences that lack what the form must say.
    """
    _check_form(form)
    count = 0
    kinds: dict[str, Counter[str]] = {"complexity": Counter(), "semantic_frames": Counter()}
    with complete_file(Path(path)) as file:
        if form != "jsonl":
            file.write('{"corpus": [\n' if form == "absynth" else "[\n")
        for sentence in sentences:
            said = carried(sentence, form)
            if isinstance(said, AnnotatedSentence):
                file.write(said.to_json() + "\n")
            else:
                kinds["complexity"][said.complexity or ""] += 1
                kinds["semantic_frames"][said.frame or ""] += 1
                line = json.dumps(_record(said, form, count), ensure_ascii=False)
                file.write((",\n" if count else "") + line)
            count += 1
        if form == "absynth":
            metadata = json.dumps(_metadata(count, kinds, origin), ensure_ascii=False)
            file.write(f'\n],\n"metadata": {metadata},\n"statistics": {{}}}}\n')
        elif form != "jsonl":
            file.write("\n]\n")
    return count


def read_corpus(path: Path | str, form: str | None = None) -> tuple[str, Iterator[Sentence]]:
    """The form of a corpus file and its sentences; ``form`` None: told from the content. JSONL is read in a stream.

    Raises UsageError for a file that is none of :data:`FORMS`, naming the record.
    """
    path = Path(path)
    if form is not None:
        _check_form(form)
    if form == "jsonl" or (form is None and _looks_like_jsonl(path)):
        return "jsonl", read_jsonl(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the corpus ({error.strerror}).") from None
    except ValueError as error:
        raise UsageError(f"{path}: expected JSON, a list of sentences or an object with a list: {error}.") from None
    records = content.get("corpus") if isinstance(content, dict) else content
    if not isinstance(records, list) or not records:
        raise UsageError(f'{path}: expected a list of sentences, or an object with a list "corpus", not an empty one.')
    found = form or _form_of(records[0], path)
    numbered = enumerate(records)
    return found, (_sentence(record, found, f"{path}, record {index}") for index, record in numbered)


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata of a full ABSynth file; raises UsageError for another file."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("metadata"), dict):
        raise UsageError(f'{path}: expected a full ABSynth file, an object with "corpus" and "metadata".')
    return dict(content["metadata"])


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UsageError(f'corpus: expected a format of {", ".join(FORMS)}; found "{form}".{nearest(form, FORMS)}')


def _looks_like_jsonl(path: Path) -> bool:
    """Whether the first line is a whole object with "words", or any object in a file that calls itself JSONL."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and ("words" in first or path.suffix == ".jsonl")


def _form_of(record: Any, path: Path) -> str:
    if isinstance(record, str):
        return "sentences_only"
    if isinstance(record, dict) and "sentence" in record:
        if "linguistic_annotations" in record:
            return "absynth"
        if "semantic_roles" in record:
            return "semantic_annotations"
        return "v1"
    raise UsageError(f'{path}, record 0: expected a sentence or an object with "sentence"; found {record!r:.80}.')


def _record(sentence: PlainSentence, form: str, index: int) -> Any:
    if form == "sentences_only":
        return sentence.text
    if sentence.arguments is None:
        raise UsageError(f"{form}: sentence {index} has no roles; only sentences_only does without them.")
    if form == "v1":
        formula = " ∧ ".join(f"{each.role}(e, {each.word})" for each in sentence.arguments)
        return {"sentence": sentence.text, "semantics": f"∃e ({formula})"}
    if sentence.frame is None or any(each.position is None for each in sentence.arguments):
        raise UsageError(f"{form}: sentence {index} has no frame or no positions of its roles; write it as v1.")
    names = {f"arg{number}": each for number, each in enumerate(sentence.arguments)}
    roles = {name: {"word": each.word, "role": each.role, "position": each.position} for name, each in names.items()}
    event = f"∃e.{sentence.frame}(e)"
    semantics = " ∧ ".join([event, *(f"{each.role}(e, {each.word})" for each in sentence.arguments)])
    record: dict[str, Any] = {"sentence": sentence.text, "semantic_roles": roles, "semantics": semantics}
    if form == "semantic_annotations":
        return record | {"frame": sentence.frame}
    if sentence.pos is None or sentence.complexity is None:
        raise UsageError(f"{form}: sentence {index} has no part of speech or complexity; write semantic_annotations.")
    variables = " ".join(f"x{each.position}" for each in sentence.arguments)
    formal = " ∧ ".join([event, *(f"{each.role}(x{each.position})" for each in sentence.arguments)])
    bearers = {each.position: name for name, each in names.items()}
    return record | {
        "linguistic_annotations": {
            "pos_tags": list(sentence.pos),
            "semantic_roles": {each.word: each.role for each in sentence.arguments},
            "formal_semantics": f"λ{variables}.{formal}",
        },
        "metadata": {
            "complexity": sentence.complexity,
            "frame": sentence.frame,
            "template": {
                "frame": sentence.frame,
                "args": [bearers.get(i) or _SLOTS.get(tag, tag.lower()) for i, tag in enumerate(sentence.pos)],
                "roles": {name: each.role for name, each in names.items()},
            },
            "length": len(sentence.words),
        },
        "corpus_metadata": {"target_frame": sentence.frame, "sentence_id": index},
    }


def _metadata(count: int, kinds: dict[str, Counter[str]], origin: Origin | None) -> dict[str, Any]:
    asked: dict[str, Any] = {"num_sentences": count, "include_annotations": True}
    if origin is not None:
        asked["complexity_distribution"] = dict(zip(COMPLEXITIES, origin.params.complexity, strict=True))
        asked["semantic_frame_distribution"] = origin.params.frame_shares
        asked["seed"] = origin.seed
        asked["corpus_params"] = origin.params.to_record()
    shares = {
        kind: {name: found / count for name, found in sorted(counts.items())} if count else {}
        for kind, counts in kinds.items()
    }
    return {"generation_params": asked, "actual_distributions": shares}


def _sentence(record: Any, form: str, where: str) -> PlainSentence:
    sentence = record if form == "sentences_only" else record.get("sentence") if isinstance(record, dict) else None
    if not isinstance(sentence, str) or not sentence.split():
        wanted = "a sentence" if form == "sentences_only" else 'an object with "sentence"'
        raise UsageError(f"{where}: expected {wanted}; found {record!r:.80}.")
    words = tuple(sentence.split())
    if form == "sentences_only":
        return PlainSentence(words)
    semantics = record.get("semantics")
    if form == "v1":
        found = _FORMULA.findall(semantics) if isinstance(semantics, str) else []
        arguments = tuple(Argument(role, word, None) for role, word in found)
        return PlainSentence(words, arguments=arguments)
    arguments = _arguments(record.get("semantic_roles"), words, where)
    metadata = record.get("metadata") if isinstance(record.get("metadata"), dict) else {}
    frame = record.get("frame") or metadata.get("frame")
    if frame is None and isinstance(semantics, str) and (event := _EVENT.search(semantics)):
        frame = event[1]
    if form == "semantic_annotations":
        return PlainSentence(words, arguments=arguments, frame=frame)
    annotations = record.get("linguistic_annotations")
    tags = annotations.get("pos_tags") if isinstance(annotations, dict) else None
    if tags is not None and (not isinstance(tags, list) or len(tags) != len(words)):
        raise UsageError(f"{where}: pos_tags must have one tag for each of the {len(words)} words; found {tags!r:.80}.")
    pos = tuple(str(tag) for tag in tags) if tags is not None else None
    return PlainSentence(words, pos, arguments, frame, metadata.get("complexity"))


def _arguments(roles: Any, words: tuple[str, ...], where: str) -> tuple[Argument, ...]:
    if not isinstance(roles, dict):
        raise UsageError(f'{where}: expected an object "semantic_roles"; found {roles!r:.80}.')
    found = []
    for name, each in roles.items():
        role, position = (each.get("role"), each.get("position")) if isinstance(each, dict) else (None, None)
        if type(position) is not int or not 0 <= position < len(words) or not isinstance(role, str):
            raise UsageError(
                f"{where}: {name} must have a role and the position of one of the {len(words)} words; "
                f"found {each!r:.80}."
            )
        if each.get("word", words[position]) != words[position]:
            raise UsageError(
                f'{where}: {name} says that word {position} is "{each["word"]}"; the sentence has "{words[position]}".'
            )
        found.append(Argument(role, words[position], position))
    return tuple(found)
