"""The backend in PyTorch, which serves every device, dtype and tool.

It is exact: its shortcuts are identities, which `docs/emax.md` proves. With them, one pass over the
finest groups serves any number of candidate group counts, and no d-to-d 3x3 convolution is needed.
Read `forward` first, then `fine_maps`, `backward` and `fine_maps_backward`; `fine_maps_nd` is the
pass over sequences and videos.
"""

from torch import Tensor

from ..backend import Backend
from ..weights import EMAXWeights
from .backward import backward
from .forward import forward

__all__ = ["PORTABLE"]


def _unsupported(x: Tensor, weights: EMAXWeights) -> str | None:
    return None


PORTABLE = Backend("portable", _unsupported, forward, backward)
