"""``python -m trace_offline.corpus --sentences N --seed S --output FILE.jsonl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trace_offline.core.errors import TraceOfflineError
from trace_offline.corpus.generator import generate_to_file
from trace_offline.corpus.lexicon import LexiconParams
from trace_offline.corpus.params import CorpusParams


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a corpus file; 0 when done, 2 for unusable input."""
    defaults = CorpusParams()
    parser = argparse.ArgumentParser(prog="python -m trace_offline.corpus", description="Write annotated sentences.")
    parser.add_argument("--sentences", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--alpha", type=float, default=defaults.alpha, help="Zipf exponent (default %(default)s)")
    parser.add_argument("--nouns", type=int, default=defaults.lexicon.nouns, help="noun lemmas (default %(default)s)")
    given = parser.parse_args(arguments)
    try:
        params = replace(defaults, alpha=given.alpha, lexicon=LexiconParams(nouns=given.nouns))
        count = generate_to_file(given.output, given.sentences, given.seed, params)
    except (TraceOfflineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} sentences written to {given.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
