"""Attention modules: EMAX and those it is compared with. They know no models and no files."""

from ..ops import EMAXMaps
from .ema import EMA
from .emax import EMAX
from .factory import ATTENTIONS, GatedAttention, create_attention
from .schedule import set_grouping

__all__ = [
    "ATTENTIONS",
    "EMA",
    "EMAX",
    "EMAXMaps",
    "GatedAttention",
    "create_attention",
    "set_grouping",
]
