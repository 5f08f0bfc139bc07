"""The error that every command prints as one line, and suggestions for misspelt names."""

import difflib
from collections.abc import Iterable

__all__ = ["UsageError", "nearest"]


class UsageError(Exception):
    """A mistake in what the user asked for; the message is one line that says what to do."""

    exit_code = 2


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the valid name whose spelling is closest to `name`."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)[0]
