"""Declaration of an option: a dataclass field that is also a flag and a key of a YAML file.

`flags.py` turns a class of such fields into flags, and `parsing.py` checks values against their
types, choices and bounds.
"""

from dataclasses import field
from math import inf
from typing import Any

__all__ = ["AT_LEAST_0", "AT_LEAST_1", "FILTERS", "FRACTION", "POSITIVE", "option"]

FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# Bounds: the least and the greatest value that an option allows.
AT_LEAST_0, AT_LEAST_1, FRACTION = (0, inf), (1, inf), (0, 1)
POSITIVE = (1e-9, inf)


def option(
    default: Any,
    help: str,
    *flags: str,
    bounds: tuple[float, float] | None = None,
    **argparse: Any,
) -> Any:
    """Declare a dataclass field that is also a command-line flag.

    Args:
        default: The value if the option is not given.
        help: The text that `--help` shows.
        flags: Further spellings, such as -b.
        bounds: The least and the greatest number allowed; `check_bounds` checks them.
        argparse: Further arguments of `add_argument`; `choices` apply to YAML files too.
    """
    metadata = {"help": help, "flags": flags, "bounds": bounds, **argparse}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
