"""EMAX in PyTorch, for every device, dtype and tool: the backend that always serves.

Everything here is exact: the shortcuts are identities, proved in `docs/emax.md`. Together they need
one pass over the finest groups whatever the number of candidate group counts, and no d-to-d 3x3
convolution. Reading order: `forward`, `fine_maps`, then `backward`, `fine_maps_backward`.
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
