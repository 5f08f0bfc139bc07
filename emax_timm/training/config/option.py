"""How an option is declared: a dataclass field that is also a flag and a key of a YAML file.

`parsing.py` turns a class of such fields into flags, and checks values against the types, the
choices and the bounds.
"""

from dataclasses import field
from math import inf
from typing import Any

__all__ = ["AT_LEAST_0", "AT_LEAST_1", "FILTERS", "FRACTION", "option"]

FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# The least and the greatest value that an option takes.
AT_LEAST_0, AT_LEAST_1, FRACTION = (0, inf), (1, inf), (0, 1)


def option(
    default: Any,
    help: str,
    *flags: str,
    bounds: tuple[float, float] | None = None,
    **argparse: Any,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: The value where none is given.
        help: What `--help` says of it.
        flags: Further spellings, such as -b.
        bounds: The least and the greatest number that `check_bounds` lets pass.
        argparse: Further arguments of `add_argument`; `choices` are checked in files too.
    """
    metadata = {"help": help, "flags": flags, "bounds": bounds, **argparse}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
