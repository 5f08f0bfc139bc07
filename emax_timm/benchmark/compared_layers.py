"""The layers that `emax benchmark modules` compares, by the number of axes of their inputs."""

from collections.abc import Callable

from torch import Tensor, nn

from ..attention import ATTENTIONS, EMAX, EMAX1d, EMAX3d
from ..ops import reference

__all__ = ["LAYERS", "LAYERS_BY_DIMS", "NaiveEMAX"]


class NaiveEMAX(EMAX):
    """EMAX by its reference formulas, the baseline for the backends."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.emax(x, self.parts())[0]


class NaiveEMAX1d(NaiveEMAX):
    dims = 1


class NaiveEMAX3d(NaiveEMAX):
    dims = 3


class SE(nn.Module):
    """timm's SE for any number of axes, which are one to it: the mean over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se = ATTENTIONS["se"](channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(x.flatten(2).unsqueeze(3)).view_as(x)


class Copy(nn.Module):
    """One read and one write of x: a lower bound for the time of every layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "copy": lambda channels: Copy(),
    "naive EMAX": NaiveEMAX,
    "EMAX": ATTENTIONS["emax"],
    "EMA": ATTENTIONS["ema"],
    "SE": ATTENTIONS["se"],
    "ECA": ATTENTIONS["eca"],
    "CBAM": ATTENTIONS["cbam"],
    "CoordAttn": ATTENTIONS["coord"],
}
LAYERS_BY_DIMS: dict[int, dict[str, Callable[..., nn.Module]]] = {
    1: {"copy": LAYERS["copy"], "naive EMAX": NaiveEMAX1d, "EMAX": EMAX1d, "SE": SE},
    2: LAYERS,
    3: {"copy": LAYERS["copy"], "naive EMAX": NaiveEMAX3d, "EMAX": EMAX3d, "SE": SE},
}
