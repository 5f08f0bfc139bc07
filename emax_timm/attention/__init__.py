"""Attention modules: torch only, they know no models and no files."""

from .emax import EMAX, set_grouping
from .functional import EMAXMaps

__all__ = ["EMAX", "EMAXMaps", "set_grouping"]
