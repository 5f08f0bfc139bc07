"""The computing core: EMAX and EMA as functions of tensors, computed by one of several backends.

`dispatch.emax` is the entry point. It chooses a backend (`triton`, `cpp` or `portable`), which
computes the layer; `autograd` makes the layer one node of autograd's graph; `reference` holds the
formulas that all backends are tested against. The core knows no modules.

These letters stand for dimensions in all files of the package:

    b     batch
    c     channels
    h, w  height and width
    l     length of a sequence
    t     frames of a video
    F     finest group count, gcd(c, factor)
    d     channels of a fine group, c / F
    G     a group count that divides F
    K     number of candidate group counts
    r     hidden units of a squeeze-and-excite gate
"""

from .backend import Backend
from .dispatch import BackendError, emax, emax_maps, explain, exporting, use_backend
from .weights import EMAXConfig, EMAXMaps, EMAXWeights, bias_of

__all__ = [
    "Backend",
    "BackendError",
    "EMAXConfig",
    "EMAXMaps",
    "EMAXWeights",
    "bias_of",
    "emax",
    "emax_maps",
    "explain",
    "exporting",
    "use_backend",
]
