"""The options of timm's train.py and validate.py: which are not here, and what is in their place.

timm_flags.yaml beside this file lists all of them; `python docs/make_timm_flags.py` makes
docs/timm_flags.md of it.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ...errors import nearest

__all__ = ["is_timm_default", "timm_flags", "unknown_options"]


@functools.cache
def timm_flags() -> dict[str, dict[str, Any]]:
    """Return what timm_flags.yaml says of each option, by its name: letters and dashes."""
    path = Path(__file__).with_name("timm_flags.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _entry(name: str) -> dict[str, Any]:
    """Return what is known of a flag, such as --fast-norm, or of a key, such as fast_norm."""
    flags = timm_flags()
    for entry in flags.values():
        if name in entry.get("also", ()):
            return entry
    return flags.get(name.lstrip("-").replace("_", "-"), {})


def is_timm_default(key: str, value: Any) -> bool:
    """Return whether a key is an option of timm that is not here, with a default of timm's.

    Such a value asks for nothing; the args.yaml of timm's runs have every option.
    """
    entry = _entry(key)
    return "here" in entry and value in [entry["default"], *entry.get("earlier", ())]


def unknown_options(
    kind: str, names: Iterable[str], valid: Iterable[str], timm: bool = True
) -> str:
    """Return one line about all options that are unknown.

    Args:
        kind: What they are: flag or key.
        names: As they were given.
        valid: The names that there are.
        timm: Whether timm's scripts have such options.

    Returns:
        For the options of timm, what is in their place; for others, the nearest valid name.
    """
    valid = list(valid)
    in_place: dict[str, list[str]] = {}
    parts = []
    for name in dict.fromkeys(names):
        if timm and (here := _entry(name).get("here")):
            in_place.setdefault(here, []).append(name)
        else:
            parts.append(f"unknown {kind} {name}; the nearest valid one is {nearest(name, valid)}")
    of_timm = [
        f"timm's {', '.join(group)} {'is' if len(group) == 1 else 'are'} not supported: {here}"
        for here, group in in_place.items()
    ]
    return "; ".join(of_timm + parts)
