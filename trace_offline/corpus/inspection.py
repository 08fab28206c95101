"""What a corpus file holds, measured on its text: counts, shares, Zipf exponents, entropies, collocations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from trace_offline.core.errors import UsageError
from trace_offline.corpus.collocation import Pairs, count_pairs, expected_information, pointwise, strength
from trace_offline.corpus.entropy import Estimate, entropy, mean_entropy, mutual_information
from trace_offline.corpus.expectation import entropy_per_word, exponent
from trace_offline.corpus.forms import PlainSentence, Sentence, read_corpus
from trace_offline.corpus.lexicon import build_lexicon
from trace_offline.corpus.lexis import lemma_lists
from trace_offline.corpus.params import COLLOCATIONS, CorpusParams, Origin, read_origin
from trace_offline.corpus.sentence import AnnotatedSentence
from trace_offline.corpus.statistics import fit_zipf, fit_zipf_by_count

RARE, SHOWN = 10, 10  # pairs seen less often than RARE are not among the SHOWN strongest
_LISTS = {"NOUN": "noun", "ADJ": "adjective", "ADV": "adverb"}


class _Counts:
    """Everything counted in one pass; memory grows with the vocabulary, and by one number for each sentence."""

    def __init__(self) -> None:
        self.sentences = self.clauses = self.attracted = self.repeated = 0
        self.seen: set[int] = set()
        self.lengths: Counter[int] = Counter()
        self.words: Counter[str] = Counter()
        self.complexity: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.clause_frames: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self.pos: Counter[str] = Counter()
        self.lists: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.pairs: Pairs = {name: Counter() for name in COLLOCATIONS}

    def add(self, sentence: Sentence) -> None:
        self.sentences += 1
        key = hash(sentence.words)
        self.repeated += key in self.seen
        self.seen.add(key)
        self.lengths[len(sentence.words)] += 1
        self.words.update(sentence.words)
        if sentence.complexity is not None:
            self.complexity[sentence.complexity] += 1
        if sentence.frame is not None:
            self.frames[sentence.frame] += 1
        if sentence.pos is not None:
            self.pos.update(sentence.pos)
        if isinstance(sentence, PlainSentence):
            self.roles.update(each.role for each in sentence.arguments or ())
            for word, tag in zip(sentence.words, sentence.pos or (), strict=False):
                self.lists[tag][word] += 1
            return
        self.roles.update(role for role in sentence.roles if role is not None)
        verbs = {}
        for clause in sentence.clauses:
            self.clauses += 1
            self.attracted += clause.attractors > 0
            self.clause_frames[clause.frame] += 1
            verbs[clause.verb + clause.passive] = f"verb {clause.frame}"
        for i, (tag, lemma) in enumerate(zip(sentence.pos, sentence.lemmas, strict=True)):
            name = _LISTS.get(tag) or verbs.get(i)
            if name is not None:
                self.lists[name][lemma] += 1
        count_pairs(sentence, self.pairs)


def inspect_corpus(path: Path | str, *, form: str | None = None) -> dict[str, Any]:
    """Measure a corpus file of any of ``FORMS``; the result holds JSON values only.

    Numbers estimated from the text are ``{"value", "stderr", "n"}``; beside them stands what was ``asked`` and what
    the generator's own distribution gives exactly (``expected``), where the parameters are written beside the file.
    What a form does not say is null. Raises UsageError for an unreadable file, and when the parameters beside the
    file are not those of its words.
    """
    found, sentences = read_corpus(path, form)
    return {"file": str(path), "form": found} | measure(sentences, read_origin(path))


def measure(sentences: Iterable[Sentence], origin: Origin | None = None) -> dict[str, Any]:
    """The measurements of :func:`inspect_corpus` on sentences at hand."""
    counts, annotated = _Counts(), False
    for sentence in sentences:
        counts.add(sentence)
        annotated = isinstance(sentence, AnnotatedSentence)
    if not counts.sentences:
        raise UsageError("the corpus has no sentence.")
    params = origin.params if origin else None
    lengths = np.repeat(list(counts.lengths), list(counts.lengths.values()))
    shares = dict(zip(("simple", "medium", "complex"), params.complexity, strict=True)) if params else None
    return {
        "sentences": counts.sentences,
        "distinct_sentences": counts.sentences - counts.repeated,
        "words": counts.words.total(),
        "word_types": len(counts.words),
        "length": {
            "mean": float(lengths.mean()),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
            "counts": {str(length): counts.lengths[length] for length in sorted(counts.lengths)},
        },
        "complexity": _shares(counts.complexity, shares),
        "frames": _shares(counts.frames),
        "clause_frames": _shares(counts.clause_frames, params.frame_shares if params else None),
        "roles": _shares(counts.roles),
        "pos": _shares(counts.pos),
        "clauses_with_attractors": counts.attracted / counts.clauses if counts.clauses else None,
        "zipf": _zipf(counts, params if annotated else None),
        "entropy": _entropies(counts, params, annotated),
        "collocations": _collocations(counts, params) if annotated else None,
        "parameters": {"seed": origin.seed, **origin.params.to_record()} if origin else None,
    }


def _shares(counts: Counter[str], asked: dict[str, float] | None = None) -> dict[str, dict[str, float]] | None:
    """Count and share of each, the most frequent first; None when the form does not say."""
    total = counts.total()
    if not total:
        return None
    rows: dict[str, dict[str, float]] = {}
    for name in [name for name, _ in counts.most_common()] + [name for name in asked or {} if name not in counts]:
        rows[name] = {"count": counts[name], "share": counts[name] / total}
        if asked is not None:
            rows[name]["asked"] = asked.get(name, 0.0)
    return rows


def _zipf(counts: _Counts, params: CorpusParams | None) -> dict[str, Any]:
    """Exponents by list. Ranks are those of the lexicon where it is known, else those by count, bias removed."""
    known = lemma_lists(build_lexicon(params.lexicon, seed=params.lexicon_seed)) if params else {}
    rows: dict[str, Any] = {}
    for name, words in {"all words": counts.words, **dict(sorted(counts.lists.items()))}.items():
        stems = known.get(name)
        if stems is not None and not set(words) <= set(stems):
            raise UsageError(
                f"the parameters beside the corpus are not those it was made with: their lexicon has no {name} "
                f'"{min(set(words) - set(stems))}". Remove the file of parameters.'
            )
        try:
            fit = fit_zipf([words[stem] for stem in stems]) if stems else fit_zipf_by_count(list(words.values()))
        except UsageError as error:
            rows[name] = {"value": None, "reason": error.message}
            continue
        rows[name] = {"value": fit.alpha, "stderr": fit.stderr, "n": fit.n, "types": len(words)}
        rows[name]["ranks"] = "lexicon" if stems else "by count"
        if stems is not None and params is not None:
            rows[name]["asked"] = exponent(params)
    return rows


def _entropies(counts: _Counts, params: CorpusParams | None, annotated: bool) -> dict[str, Any]:
    rows: dict[str, Any] = {"word": _row(entropy(list(counts.words.values())))}
    for name, words in sorted(counts.lists.items()):
        rows[name] = _row(entropy(list(words.values())))
    if annotated and counts.lists:
        row = rows["content word given its list"] = _row(mean_entropy(counts.lists))
        if params is not None:
            row["expected"] = entropy_per_word(params, exponent(params))
            row["asked"] = params.entropy
    return rows


def _collocations(counts: _Counts, params: CorpusParams | None) -> dict[str, Any]:
    """Mutual information in bits; of pairs with verbs given the frame, as the frame is no collocation."""
    rows: dict[str, Any] = {}
    for kind, pairs in counts.pairs.items():
        by_frame: defaultdict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        for (frame, one, two), count in pairs.items():
            by_frame[frame][one, two] += count
        parts = [mutual_information(each) for each in by_frame.values() if each.total() > 1]
        n = sum(part.n for part in parts)
        if not n:
            rows[kind] = {"bits": None, "reason": "there are fewer than two such pairs."}
            continue
        bits = sum(part.n * part.value for part in parts) / n
        stderr = float(np.sqrt(sum((part.n * part.stderr) ** 2 for part in parts))) / n
        rows[kind] = {"bits": _row(Estimate(bits, stderr, n)), "strongest": _strongest(pairs)}
        if params is not None:
            rows[kind]["bits"]["expected"] = expected_information(kind, params)
            rows[kind]["strength"] = _row(strength(kind, pairs, params)) | {"asked": getattr(params, kind)}
    return rows


def _strongest(pairs: Counter[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The pairs with the most pointwise mutual information; rare ones, whose value is mostly luck, left out."""
    told = {pair: bits for pair, bits in pointwise(pairs).items() if pairs[pair] >= RARE}
    best = sorted(told, key=lambda pair: (-told[pair], pair))[:SHOWN]
    return [{"words": list(pair[1:]), "count": pairs[pair], "pmi": told[pair]} for pair in best]


def _row(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "stderr": estimate.stderr, "n": estimate.n}
