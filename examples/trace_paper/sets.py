"""The fixed evaluation sets on which every checkpoint is measured, built from the sentences kept beside the runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from train import Setting, make_tokenizer

from trace_offline.corpus import CorpusParams, LexiconParams, read_jsonl
from trace_offline.corpus.interventions import Pair, intervene_all, write_pairs
from trace_offline.corpus.params import origin_path
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


def kind_of(pair: Pair) -> tuple[str, tuple[str, ...]] | None:
    """(kind, words to choose between) of a pair; None for a pair that is neither near nor far.

    *near*: the word that decides stands just before the one that is compared (bigrams would do). *far*: other words
    stand between. ``agreement_…``: the number of the verb. ``role_…``: near, an object after a verb that takes none;
    far, a preposition that marks no role of the verb, with the object in between.
    """
    place = pair.original_positions[0]
    if pair.kind == "agreement_violation":
        clause = next(clause for clause in pair.original.clauses if clause.verb == place)
        near = clause.subject == place - 1
        return f"agreement_{'near' if near else 'far'}", ("plural" if clause.plural else "singular", "")
    if pair.detail == "object":
        return "role_near", ("", "")
    verb = max(clause.verb for clause in pair.original.clauses if clause.verb < place)
    between = pair.original.pos[verb + 1 : place]
    return ("role_far", (pair.original.words[place], pair.changed.words[place])) if "NOUN" in between else None


def balanced(pairs: Iterable[Pair], most: int) -> list[Pair]:
    """At most ``most`` pairs of each kind, in which no word is right more often than it is wrong.

    As many singular verbs as plural ones, and each preposition put in place of another as often as the other way
    round: whoever only knows which word is frequent is right in half of the pairs.
    """
    found: dict[str, dict[tuple[str, ...], list[Pair]]] = {}
    for pair in pairs:
        kind = kind_of(pair)
        if kind is not None:
            found.setdefault(kind[0], {}).setdefault(kind[1], []).append(replace(pair, kind=kind[0]))
    chosen: list[Pair] = []
    for kind in sorted(found):
        choices = found[kind]
        if kind == "role_near":
            chosen += next(iter(choices.values()))[:most]
            continue
        swapped = {("singular", ""): ("plural", ""), ("plural", ""): ("singular", "")}
        sides = [(choice, swapped.get(choice, choice[::-1])) for choice in sorted(choices)]
        shared = [(a, b, min(len(choices[a]), len(choices[b]))) for a, b in sides if a < b and b in choices]
        total = 2 * sum(count for *_, count in shared)
        for a, b, count in shared:
            kept = count if total <= most else int(count * most / total)
            chosen += choices[a][:kept] + choices[b][:kept]
    return chosen


def write_grammar(source: Path, params: CorpusParams) -> None:
    """Put the grammar beside a file. Without seed and count: the sentences are no first part of what was drawn."""
    origin_path(source).write_text(json.dumps({"params": params.to_record()}) + "\n", encoding="utf-8")


def build_sets(folder: Path, setting: Setting, *, sentences: int, words: int, pairs: int) -> dict[str, Path]:
    """The four sets, by name → folder; those that are there are kept.

    ``sentences``: held-out sentences with all tasks, the other form of every verb, and what the training text says
    about them. ``words``: further held-out sentences with parts of speech only, for probes that never see a word of
    the test in training. ``seen_and_new``: as many training sentences as held-out ones. ``changed``: held-out
    sentences and the same with one word changed, ``pairs`` of each kind.
    """
    made = folder / "sets"
    made.mkdir(exist_ok=True)
    lexicon = LexiconParams(setting.nouns, setting.verbs_per_frame, setting.adjectives, setting.adverbs)
    params = CorpusParams(lexicon=lexicon)
    tokenizer = made / "tokenizer"
    if not tokenizer.exists():
        make_tokenizer(folder).save_pretrained(tokenizer)
    found = {name: made / name for name in ("sentences", "words", "seen_and_new", "changed")}
    held_out = folder / "held_out.jsonl"
    for name, start, stop in (("sentences", 0, sentences), ("words", sentences, sentences + words)):
        if found[name].exists():
            continue
        records = [annotated(record) for record in read_records(held_out, start, stop)]
        source = made / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        write_grammar(source, params)
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
    if not found["seen_and_new"].exists():
        source = made / "seen_and_new.jsonl"
        train = folder / "train.jsonl"
        records = read_records(train, 0, words) + read_records(held_out, sentences, sentences + words)
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        build_evaluation_set(
            found["seen_and_new"],
            [source],
            tokenizer=tokenizer,
            tasks=(),
            name="seen_and_new",
            licence=LICENCE,
            training_text=[train],
        )
    if not found["changed"].exists():
        source = made / "changed.jsonl"
        every = (
            pair
            for kind in ("agreement_violation", "role_violation")
            for pair in intervene_all(read_jsonl(held_out), kind, 0, params)
            if pair is not None
        )
        write_pairs(source, balanced(every, pairs))
        write_grammar(source, params)
        build_evaluation_set(found["changed"], [source], tokenizer=tokenizer, tasks=(), name="changed", licence=LICENCE)
    return found
