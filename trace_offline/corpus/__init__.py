"""Synthetic English-like sentences whose parts of speech, roles and agreement are known by construction."""

from trace_offline.corpus.generator import CorpusParams, generate, generate_to_file
from trace_offline.corpus.grammar import FRAMES, ROLES, Frame
from trace_offline.corpus.lexicon import Lexicon, LexiconParams, build_lexicon
from trace_offline.corpus.sentence import AnnotatedSentence, Clause, read_jsonl, write_jsonl
from trace_offline.corpus.statistics import ZipfFit, fit_zipf, log_log_slope

__all__ = [
    "FRAMES",
    "ROLES",
    "AnnotatedSentence",
    "Clause",
    "CorpusParams",
    "Frame",
    "Lexicon",
    "LexiconParams",
    "ZipfFit",
    "build_lexicon",
    "fit_zipf",
    "generate",
    "generate_to_file",
    "log_log_slope",
    "read_jsonl",
    "write_jsonl",
]
