"""Synthetic English-like sentences whose parts of speech, roles and agreement are known by construction."""

from trace_offline.corpus.generator import generate, generate_to_file
from trace_offline.corpus.grammar import FRAMES, ROLES, Frame
from trace_offline.corpus.interventions import KINDS, intervene, intervene_all
from trace_offline.corpus.lexicon import Lexicon, LexiconParams, build_lexicon
from trace_offline.corpus.pairs import Pair, read_pairs, write_pairs
from trace_offline.corpus.params import CorpusParams, Origin, origin_path, read_origin, write_origin
from trace_offline.corpus.sentence import AnnotatedSentence, Clause, read_jsonl, write_jsonl
from trace_offline.corpus.statistics import ZipfFit, fit_zipf, log_log_slope

__all__ = [
    "FRAMES",
    "KINDS",
    "ROLES",
    "AnnotatedSentence",
    "Clause",
    "CorpusParams",
    "Frame",
    "Lexicon",
    "LexiconParams",
    "Origin",
    "Pair",
    "ZipfFit",
    "build_lexicon",
    "fit_zipf",
    "generate",
    "generate_to_file",
    "intervene",
    "intervene_all",
    "log_log_slope",
    "origin_path",
    "read_jsonl",
    "read_origin",
    "read_pairs",
    "write_jsonl",
    "write_origin",
    "write_pairs",
]
