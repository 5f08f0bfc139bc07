"""EMAX for sequences and for videos: the formulas of `EMAX` with one or three spatial axes.

`docs/emax.md` has the formulas for any number of axes; `emax_timm.ops` explains the letters in the
shapes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..ops import EMAXMaps, emax, emax_maps
from .children import by_children, changed_child
from .emax import EMAX

__all__ = ["EMAX1d", "EMAX3d"]

# Each of these is one node of a torch.fx graph, because the code inside depends on the dtype of x.
torch.fx.wrap("emax")
torch.fx.wrap("emax_maps")


class EMAX1d(EMAX):
    """EMAX attention for sequences, a layer that scales features [b, c, l] and keeps their shape.

    It goes after the convolutions of a block, like `EMAX`. It is not causal: every position of the
    output follows from means over the whole sequence. A sequence of a padded batch gives what it
    gives alone if the forward pass is told by a mask where its tokens are.
    """

    dims: ClassVar[int] = 1

    @torch.jit.export
    def attention(self, x: Tensor, mask: Tensor | None = None) -> EMAXMaps:
        """Compute the attention maps of x [b, c, l] without applying them.

        The spatial attention is [b, F, l], and 0 where there is no token; the arguments are those
        of `forward`. In training mode every call draws new noise for the choice of group counts.
        """
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change, mask)[1]
        return emax_maps(x, self.weights(), self.training, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the attention to x; the result has the shape of x.

        Args:
            x: The sequences, [b, c, l].
            mask: Where they have tokens, [b, l], boolean: each sequence is computed from its tokens
                alone, in their order, wherever in the row they are and whatever stands between and
                around them. Other positions are returned as they are. None means that there are
                tokens everywhere.

        Raises:
            ValueError: If x or the mask has another shape, or the mask another dtype.
            RuntimeError: If a backend was requested that cannot serve.
        """
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change, mask)[0]
        return emax(x, self.weights(), self.training, mask)


class EMAX3d(EMAX):
    """EMAX attention for videos, a layer that scales features [b, c, t, h, w] of any sizes.

    It goes after the convolutions of a block, like `EMAX`, and keeps the shape. It is not causal:
    every frame of the output follows from means over all frames. `forward(x)` and `attention(x)`
    are those of `EMAX`, for x [b, c, t, h, w].
    """

    dims: ClassVar[int] = 3
