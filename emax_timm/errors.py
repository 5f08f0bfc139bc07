"""The error that every command prints as one line, and the nearest name for one that is wrong."""

import difflib
from collections.abc import Iterable

__all__ = ["UsageError", "nearest"]


class UsageError(Exception):
    """A mistake in what the user asked for; its message is one line that says what to do."""

    exit_code = 2


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that is spelt most like `name`."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)[0]
