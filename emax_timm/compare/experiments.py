"""Changes of a model that a study tries out, and that the package does not offer.

A method of a study names one by its key `experiment`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import EMAX
from ..errors import UsageError
from .gradients import choosing_layers

__all__ = ["EXPERIMENTS", "WideController", "parameters_ending", "widen_controllers"]

EPS = 1e-5  # as in the layer's norm, so that a constant channel has a gradient


class WideController(nn.Linear):
    """A controller of the grouping that sees each channel's mean, deviation and maximum.

    That of EMAX sees the means alone, [b, c]. This one gets them as its argument, and the rest from
    the input that the layer was last called with; the layer computes by its formulas then, as it
    does around every child that is not its own.

    It starts as EMAX's does: all weights 0, and a bias that chooses the finest group count.

    Args:
        layer: The layer that it is for, which must have a controller.
    """

    def __init__(self, layer: EMAX) -> None:
        own: Any = layer.group_controller
        dd: dict[str, Any] = {"device": own.weight.device, "dtype": own.weight.dtype}
        # Its random initial values are not used, and must not move those of what follows.
        with torch.random.fork_rng(devices=[]):
            super().__init__(3 * layer.channels, len(layer.candidates), **dd)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(own.bias)
        self.spread: Tensor | None = None  # [b, 2c], while the layer is called
        layer.register_forward_pre_hook(self._look)
        layer.register_forward_hook(self._forget)

    def _look(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(2).to(self.weight.dtype)  # [b, c, h*w]
        deviation = (x.var(2, correction=0) + EPS).sqrt()
        self.spread = torch.cat([deviation, x.amax(2)], 1)

    def _forget(self, *_: Any) -> None:
        self.spread = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits [b, K] from the means of the channels [b, c]."""
        if self.spread is None:
            raise RuntimeError("a wide controller works within a call of its layer alone")
        return super().forward(torch.cat([input, self.spread.to(input.dtype)], 1))


def widen_controllers(model: nn.Module) -> None:
    """Give every EMAX layer that chooses its group count a `WideController`.

    Raises:
        UsageError: If none does.
    """
    choosing = choosing_layers(model)
    if not choosing:
        raise UsageError("wide_controller: no EMAX layer of the model chooses its group count")
    for layer in choosing.values():
        layer.group_controller = WideController(layer)


def parameters_ending(model: nn.Module, end: str) -> list[nn.Parameter]:
    """Return the parameters whose names end with whole parts of a name, such as `conv3x3.bias`.

    Raises:
        UsageError: If there are none.
    """
    found = [p for name, p in model.named_parameters() if f".{name}".endswith(f".{end}")]
    if not found:
        raise UsageError(f"init: no parameter's name ends with {end}")
    return found


EXPERIMENTS: dict[str, Callable[[nn.Module], None]] = {"wide_controller": widen_controllers}
"""By name, functions that change a new model in place, before its training is set up."""
