"""The optimizer's step, which the device itself leaves out if a flag on the device says so.

The host need not know whether a step is good when it launches it. It learns that a step later, and
before it launches the next step of the optimizer it brings what the optimizer counts on the host
back to where it was. So the results are bit for bit those of a host that waits.
"""

import random
from collections.abc import Iterable
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from .config import TrainConfig

__all__ = ["FUSED", "OptimizerStep", "as_integers", "masked", "put_back"]

# torch's optimizers whose fused kernels take a flag that leaves the step out, as they do for
# torch's gradient scaler.
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

# Integers of the size of a value: a product with 0 or 1 keeps or clears their bits, also of a NaN.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Integers = dict[torch.dtype, list[Tensor]]


def as_integers(tensors: Iterable[Tensor]) -> Integers:
    """Return views of the tensors as integers of the same size, by their type."""
    views: Integers = {}
    for tensor in tensors:
        values = tensor.detach()
        values = torch.view_as_real(values) if values.is_complex() else values
        dtype = _INTEGERS[values.element_size()]
        views.setdefault(dtype, []).append(values.view(dtype))
    return views


def masked(values: Integers, refused: Tensor) -> Integers:
    """Return copies of the values if `refused`, bool [], is true, and zeros if not."""
    return {
        dtype: list(torch._foreach_mul(some, refused.to(dtype))) for dtype, some in values.items()
    }


def put_back(values: Integers, kept: Integers, refused: Tensor) -> None:
    """Overwrite the values with what `masked` has kept of them if `refused`, else keep them."""
    for dtype, some in values.items():
        torch._foreach_mul_(some, refused.logical_not().to(dtype))
        torch._foreach_add_(some, kept[dtype])


class OptimizerStep:
    """Checks and clips the gradients and makes the optimizer's step, unless it is refused.

    Args:
        config: Its `clip_grad` and `clip_mode` say how gradients are clipped. Where its
            `opt_kwargs` do not say how torch's own optimizers compute, they are fused on a GPU.
        model: The model, not compiled and not in DistributedDataParallel.
        optimizer: Any optimizer whose state is in its `state`, its groups, numbers and generators.
        scaler: The gradient scaler, which may be disabled.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.config, self.model, self.optimizer, self.scaler = config, model, optimizer, scaler
        self.parameters = list(model.parameters())
        # The device is where the parameters are; what is elsewhere is for the host to restore.
        self.device = self.parameters[0].device
        base: Any = _base(optimizer)
        own = {"fused", "foreach", "capturable", "differentiable"} & config.opt_kwargs.keys()
        if self.device.type == "cuda" and type(base) in FUSED and not own:
            for group in base.param_groups:
                group.update(fused=True, foreach=False)
        self._before: _HostState | None = None
        self._tensors: list[Tensor] = []
        self._integers: Integers = {}

    def needs_host(self) -> str:
        """Return why only the host can leave out a step of this optimizer; "" if the device can."""
        kind = type(_base(self.optimizer))
        if not kind.__module__.startswith(("timm.optim.", "torch.optim.")):
            return f"{kind.__name__} may keep its state anywhere"
        return ""

    def check(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the norm of all gradients, [], or whether the scaler overflows, [], else None.

        The scaler itself looks for infinite gradients, to skip their step.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            found = self.scaler._found_inf_per_device(self.optimizer).values()
            return None, torch.stack(list(found)).sum()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients), None

    def make(self, norm: Tensor | None, overflow: Tensor | None, refused: Tensor | bool) -> None:
        """Clip the gradients and make the step, unless it is refused; then drop the gradients.

        Args:
            norm, overflow: What `check` has returned.
            refused: Whether the step is left out: as the host knows it, or a bool [] tensor that
                the host has not read. Then `revert` must be called before the next step, once the
                host knows that the step was left out, for `overflow` too.
        """
        if isinstance(refused, Tensor):
            self.clip(norm)
            skipped = refused if overflow is None else refused | (overflow > 0)
            self._step_unless(skipped)
            self._update_scaler_unless(refused)
        elif refused:
            self.drop()
        else:
            self._before = None
            self.clip(norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def revert(self) -> None:
        """Restore what the last step, which the device has left out, has changed on the host."""
        if self._before is not None:
            self._before.restore()

    def drop(self) -> None:
        """Drop the gradients; the scaler, which may have unscaled them, keeps its scale."""
        if self.scaler.is_enabled() and self.scaler._found_inf_per_device(self.optimizer):
            state = self.scaler.state_dict()
            self.scaler.update()
            self.scaler.load_state_dict(state)
        self.optimizer.zero_grad()

    def clip(self, norm: Tensor | None) -> None:
        """Clip the gradients as configured; `norm` is their norm, [], if it is known."""
        if self.config.clip_grad is None:
            return
        if norm is not None and self.config.clip_mode == "norm":
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad, norm)
            return
        without_head = self.config.clip_mode == "agc"
        parameters = model_parameters(self.model, exclude_head=without_head)
        dispatch_clip_grad(parameters, self.config.clip_grad, mode=self.config.clip_mode)

    def _step_unless(self, skipped: Tensor) -> None:
        """Make the optimizer's step; the device leaves it out if `skipped`, bool []."""
        optimizer: Any = self.optimizer
        if type(optimizer) in FUSED and all(g.get("fused") for g in optimizer.param_groups):
            self._before = None  # these count on the device
            optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
            return
        self._before = _HostState(optimizer, self.device)
        tensors = [p for p in self.parameters if p.grad is not None] + self._before.on_device
        with torch.no_grad():
            values = self._as_integers(tensors)
            kept = masked(values, skipped)
            optimizer.step()
            put_back(values, kept, skipped)

    def _as_integers(self, tensors: list[Tensor]) -> Integers:
        # The views are made anew when the optimizer has replaced tensors of its state.
        same = len(tensors) == len(self._tensors)
        if not same or any(a is not b for a, b in zip(tensors, self._tensors, strict=True)):
            self._tensors, self._integers = tensors, as_integers(tensors)
        return self._integers

    def _update_scaler_unless(self, refused: Tensor) -> None:
        if not self.scaler.is_enabled():
            return
        scale, tracker = self.scaler._check_scale_growth_tracker("update")
        values = as_integers([scale, tracker])
        kept = masked(values, refused)
        self.scaler.update()
        put_back(values, kept, refused)


class _HostState:
    """The state of an optimizer before a step, as far as the host has to restore it.

    Args:
        optimizer: The optimizer.
        device: Tensors there are listed in `on_device` and only kept by reference: the device
            restores them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = _base(optimizer), device
        self.on_device: list[Tensor] = []
        state, groups = self.optimizer.state, self.optimizer.param_groups
        self.state = {key: self._copy(value) for key, value in state.items()}
        # The learning rate is the schedule's, which has gone on when a step is reverted.
        self.groups = [
            {k: self._copy(v) for k, v in group.items() if k not in ("params", "lr")}
            for group in groups
        ]
        own = vars(self.optimizer)
        self.numbers = {k: v for k, v in own.items() if isinstance(v, int | float)}
        generators = [value for value in own.values() if isinstance(value, random.Random)]
        self.generators = [(generator, generator.getstate()) for generator in generators]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device != self.device:
                return value.clone()
            self.on_device.append(value)
            return value
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self._copy, value))
        return value

    def restore(self) -> None:
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
        for group, before in zip(self.optimizer.param_groups, self.groups, strict=True):
            for key in group.keys() - before.keys() - {"params", "lr"}:
                del group[key]
            group.update(before)
        vars(self.optimizer).update(self.numbers)
        for generator, before in self.generators:
            generator.setstate(before)


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself; timm's Lookahead wraps it."""
    return getattr(optimizer, "_base_optimizer", optimizer)
