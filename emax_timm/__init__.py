"""EMAX attention in timm backbones; importing this package registers the models with timm."""

# Before torch's compiler, which the attention asks for: the other way round Python collects garbage
# once more while it loads both, which takes 0.2 seconds.
import timm  # noqa: F401

from .attention import EMAX, EMAX1d, EMAX3d, EMAXMaps, create_attention, set_grouping
from .interpret import capture_attention, visualize_attention
from .models import insert_attention
from .ops import use_backend
from .version import __version__ as __version__

__all__ = [
    "EMAX",
    "EMAX1d",
    "EMAX3d",
    "EMAXMaps",
    "capture_attention",
    "create_attention",
    "insert_attention",
    "set_grouping",
    "use_backend",
    "visualize_attention",
]
