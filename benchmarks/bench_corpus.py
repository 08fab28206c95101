"""Sentences a second of the corpus generator, file and all, and its memory: a stream, so the same for any size.

Each case runs in a process of its own and is timed in CPU seconds, which a shared machine stretches less than the
clock; one process, one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import result, save, versions

MILLION = 1_000_000
OPTIONS = "CorpusParams(noun_adjective=0.5, verb_noun=0.3, verb_adverb=0.5)"
LARGE = "CorpusParams(lexicon=LexiconParams.for_vocabulary(10_000))"
CASES = (
    # what, parameters, form, sentences, limit in CPU seconds
    ("one million sentences, JSONL", "CorpusParams()", "jsonl", MILLION, 60.0),
    ("100,000 sentences, JSONL, vocabulary of 10,000", LARGE, "jsonl", MILLION // 10, 6.0),
    ("100,000 sentences, JSONL, collocations", OPTIONS, "jsonl", MILLION // 10, 6.0),
    ("100,000 sentences, full ABSynth", "CorpusParams()", "absynth", MILLION // 10, None),
    ("100,000 sentences, sentences only", "CorpusParams()", "sentences_only", MILLION // 10, None),
)
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from trace_offline.corpus import CorpusParams, LexiconParams, generate_to_file
path, sentences, form = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
generate_to_file(path, 1000, 0, {params}, form=form)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
generate_to_file(path, sentences, 0, {params}, form=form)
seconds = time.process_time() - started
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"seconds": seconds, "before": before, "after": after, "bytes": path.stat().st_size}}))
"""


def main() -> int:
    rows = []
    where = {"versions": versions("numpy", "scipy")}
    for case, params, form, sentences, limit in CASES:
        with tempfile.TemporaryDirectory() as folder:
            program = PROGRAM.format(params=params)
            path = str(Path(folder) / "corpus")
            command = [sys.executable, "-c", program, path, str(sentences), form]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        more = {"limit": limit} if limit is not None else {}
        rows.append(
            result(
                case, found["seconds"], "CPU s", sentences_per_second=sentences / found["seconds"],
                file_mb=found["bytes"] / 1e6, **more, **where,
            )
        )  # fmt: skip
        if sentences == MILLION:
            # The peak of a process that has written a thousand sentences, and what a million add to it.
            grown = (found["after"] - found["before"]) / 1024
            rows.append(result(f"{case}: memory above that of 1,000", grown, "MB", limit=32.0, **where))
    save("corpus", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
