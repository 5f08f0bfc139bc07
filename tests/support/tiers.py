"""Which cases of a test run by default, and which at night."""

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet

__all__ = ["mostly_slow"]


def mostly_slow(cases: Iterable[Any], *kept: int) -> list[ParameterSet]:
    """Cases for `pytest.mark.parametrize`, of which all are slow but for those at these places.

    Args:
        cases: Values, tuples of values, or `pytest.param`s.
        kept: Places of the cases that a change must pass by default.
    """
    params = [
        case
        if isinstance(case, ParameterSet)
        else pytest.param(*case)
        if isinstance(case, tuple)
        else pytest.param(case)
        for case in cases
    ]
    return [
        param if place in kept else param._replace(marks=[*param.marks, pytest.mark.slow])
        for place, param in enumerate(params)
    ]
