"""The fixed evaluation sets on which every checkpoint is measured, built from the sentences kept beside the runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import Setting, make_tokenizer

from trace_offline.corpus import CorpusParams, LexiconParams
from trace_offline.corpus.interventions import KINDS, intervene_file
from trace_offline.corpus.params import Origin, write_origin
from trace_offline.evaluation.build import build_evaluation_set

TASKS = ("pos", "role", "subject_number", "agreement", "attractors")
LICENCE = "CC0-1.0"


def number_of_subject(record: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(word, singular or plural) just before each finite verb, unless that word is the subject's own noun.

    Whoever predicts the verb there has to know the number of a noun further back: agreement, not word class.
    """
    for clause in record["clauses"]:
        before = clause["verb"] - 1
        if before != clause["subject"]:
            yield before, "plural" if clause["plural"] else "singular"


def roles_known_from_the_left(record: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(noun, role) of every argument but the subjects: verb and preposition before it decide, the noun says nothing.

    A subject's role depends on the verb after it, which a causal model has not read yet.
    """
    subjects = {clause["subject"] for clause in record["clauses"]}
    for word, role in enumerate(record["roles"]):
        if role is not None and word not in subjects:
            yield word, role


def annotated(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the two tasks of this example, one label (or none) for each word."""
    lists: dict[str, list[str | None]] = {}
    for task, labels in (("roles", roles_known_from_the_left), ("subject_number", number_of_subject)):
        lists[task] = [None] * len(record["words"])
        for word, label in labels(record):
            lists[task][word] = label
    return {**record, **lists}


def read_records(path: Path, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
    """Lines ``start`` to ``stop`` (exclusive) of a corpus file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][start:stop]


def build_sets(folder: Path, setting: Setting, *, sentences: int, words: int, pairs: int) -> dict[str, Path]:
    """The three sets, by name → folder; those that are there are kept.

    ``sentences``: held-out sentences with all tasks, the other form of every verb, and what the training text says
    about them. ``words``: further held-out sentences with parts of speech only, for probes that never see a word of
    the test in training. ``pairs``: held-out sentences and the same with one word changed, four kinds.
    """
    made = folder / "sets"
    made.mkdir(exist_ok=True)
    lexicon = LexiconParams(setting.nouns, setting.verbs_per_frame, setting.adjectives, setting.adverbs)
    params = CorpusParams(lexicon=lexicon)
    tokenizer = made / "tokenizer"
    if not tokenizer.exists():
        make_tokenizer(folder).save_pretrained(tokenizer)
    found = {name: made / name for name in ("sentences", "words", "pairs")}
    held_out = folder / "held_out.jsonl"
    for name, start, stop in (("sentences", 0, sentences), ("words", sentences, sentences + words)):
        if found[name].exists():
            continue
        records = [annotated(record) for record in read_records(held_out, start, stop)]
        source = made / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        write_origin(source, Origin(setting.corpus_seed, len(records), params))
        both = name == "sentences"
        build_evaluation_set(
            found[name],
            [source],
            tokenizer=tokenizer,
            tasks=TASKS if both else ("pos",),
            name=name,
            licence=LICENCE,
            training_text=[folder / "train.jsonl"] if both else (),
        )
    if not found["pairs"].exists():
        write_origin(held_out, Origin(setting.corpus_seed, len(read_records(held_out)), params))
        source = made / "pairs.jsonl"
        intervene_file(held_out, source, KINDS, seed=0, limit=pairs)
        build_evaluation_set(found["pairs"], [source], tokenizer=tokenizer, tasks=(), name="pairs", licence=LICENCE)
    return found
