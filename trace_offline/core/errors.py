"""The errors a user can meet. Each message says what was expected, what was found and what to do next.

Every class takes one string, so that errors survive the trip from a worker process (an exception whose
``__init__`` takes anything else cannot be unpickled and would break the whole pool).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TraceOfflineError(Exception):
    """Base of all errors that are the user's to mend; the command line prints the text, never a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(TraceOfflineError):
    """A command, option, parameter or SQL text that cannot be used as given."""


class CheckpointError(TraceOfflineError):
    """A checkpoint that cannot be read, or that is not what it claims to be."""


class EvaluationSetError(TraceOfflineError):
    """An evaluation set that is missing, damaged or does not fit the checkpoint."""


class StoreError(TraceOfflineError):
    """A store that cannot be opened, read or written."""


class DeviceMemoryError(TraceOfflineError):
    """A GPU that has too little memory, also for half as much at once."""


class NotApplicable(TraceOfflineError):
    """Raised by an analyzer whose question has no meaning here; a normal outcome, stored with the reason."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``' Did you mean "probe"?'`` for the closest of ``known``, or ``''`` when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{found[0]}"?' if found else ""
