"""Attention layers: EMAX and the attentions that it is compared with, as modules for any network.

This package knows neither models nor files.
"""

from ..ops import EMAXMaps
from .ema import EMA
from .emax import EMAX
from .emax_nd import EMAX1d, EMAX3d
from .factory import ATTENTIONS, GatedAttention, create_attention
from .schedule import set_grouping

__all__ = [
    "ATTENTIONS",
    "EMA",
    "EMAX",
    "EMAX1d",
    "EMAX3d",
    "EMAXMaps",
    "GatedAttention",
    "create_attention",
    "set_grouping",
]
