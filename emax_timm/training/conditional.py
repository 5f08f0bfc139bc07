"""The optimizer's step, which the device itself leaves out if a flag on the device says so.

The host need not know whether a step is good when it launches it. It learns that a step later, and
before it launches the next step of the optimizer it brings what the optimizer counts on the host
back to where it was. So the results are bit for bit those of a host that waits.
"""

import operator
import random
from collections.abc import Iterable
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from .config import TrainConfig

__all__ = ["OptimizerStep", "Refusal", "as_integers", "base_optimizer"]

# torch's optimizers whose fused kernels take a flag that leaves the step out, as they do for
# torch's gradient scaler.
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

# Integers of the size of a value: a product with 0 or 1 keeps or clears their bits, also of a NaN.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Integers = dict[torch.dtype, list[Tensor]]

# Copies of up to so many bytes are kept from step to step: a small model's step is bound by the
# host, which takes longer to allocate them. Those of a large model take the place of activations.
_SMALL = 2**27


def as_integers(tensors: Iterable[Tensor]) -> Integers:
    """Return views of the tensors as integers of the same size, by their type."""
    views: Integers = {}
    for tensor in tensors:
        values = tensor.detach()
        values = torch.view_as_real(values) if values.is_complex() else values
        dtype = _INTEGERS[values.element_size()]
        views.setdefault(dtype, []).append(values.view(dtype))
    return views


class Refusal:
    """Whether a step is left out, which only the device knows.

    Args:
        flag: It is left out if this tensor, bool [], is true.
    """

    def __init__(self, flag: Tensor) -> None:
        self.flag = flag
        self._factors: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return 1 and 0 if the step is left out, else 0 and 1, each []."""
        if dtype not in self._factors:
            bad = self.flag.to(dtype)
            self._factors[dtype] = bad, 1 - bad
        return self._factors[dtype]

    def needed(self, values: Integers) -> Integers:
        """Return copies of the values if the step is left out, else zeros of their shapes."""
        return {
            dtype: list(torch._foreach_mul(some, self.factors(dtype)[0]))
            for dtype, some in values.items()
        }

    def put_back(self, values: Integers, kept: Integers, needed: bool = False) -> None:
        """Overwrite the values with copies of them if the step is left out; uses up the copies.

        Args:
            values, kept: The values and their copies.
            needed: Whether the copies are from `needed`.
        """
        for dtype, some in values.items():
            bad, good = self.factors(dtype)
            torch._foreach_mul_(some, good)
            if not needed:
                torch._foreach_mul_(kept[dtype], bad)
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
        base: Any = base_optimizer(optimizer)
        own = {"fused", "foreach", "capturable", "differentiable"} & config.opt_kwargs.keys()
        if self.device.type == "cuda" and type(base) in FUSED and not own:
            for group in base.param_groups:
                group.update(fused=True, foreach=False)
        self._before: _HostState | None = None
        self._tensors: list[Tensor] = []
        self._integers: Integers = {}
        self._copies: Integers | None = None

    def needs_host(self) -> str:
        """Return why only the host can leave out a step of this optimizer; "" if the device can."""
        kind = type(base_optimizer(self.optimizer))
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

    def make(self, norm: Tensor | None, overflow: Tensor | None, refused: Refusal | bool) -> None:
        """Clip the gradients and make the step, unless it is refused; then drop the gradients.

        Args:
            norm, overflow: What `check` has returned.
            refused: Whether the step is left out: as the host knows it, or as the device does.
                Then `revert` must be called before the next step, once the host knows that the
                step was left out, for `overflow` too.
        """
        if isinstance(refused, Refusal):
            self.clip(norm)
            both = overflow is not None
            self._step_unless(Refusal(refused.flag | (overflow > 0)) if both else refused)
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

    def _step_unless(self, refused: Refusal) -> None:
        optimizer: Any = self.optimizer
        fused = type(optimizer) in FUSED and all(g.get("fused") for g in optimizer.param_groups)
        if fused and not _lacks_momentum(optimizer):
            self._before = None  # these count on the device
            optimizer.grad_scale, optimizer.found_inf = None, refused.flag.float()
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
            return
        self._before = _HostState(optimizer, self.device, self._before)
        tensors = [p for p in self.parameters if p.grad is not None] + self._before.on_device
        with torch.no_grad():
            if not _same(tensors, self._tensors):  # the optimizer may have replaced some
                self._tensors = tensors
                # Each once: values that two parameters share must not be put back twice.
                once = {(t.data_ptr(), t.nbytes): t for t in tensors}.values()
                small = sum(tensor.nbytes for tensor in once) <= _SMALL
                self._integers = as_integers(once)
                self._copies = as_integers([t.detach().clone() for t in once]) if small else None
            copies = self._copies
            if copies is None:
                kept = refused.needed(self._integers)
            else:
                kept = copies
                for dtype, values in self._integers.items():
                    torch._foreach_copy_(kept[dtype], values)
            optimizer.step()
            refused.put_back(self._integers, kept, needed=copies is None)

    def _update_scaler_unless(self, refused: Refusal) -> None:
        if not self.scaler.is_enabled():
            return
        scale, tracker = self.scaler._check_scale_growth_tracker("update")
        values = as_integers([scale, tracker])
        kept = refused.needed(values)
        self.scaler.update()
        refused.put_back(values, kept, needed=True)


class _HostState:
    """The state of an optimizer before a step, as far as the host has to restore it.

    Args:
        optimizer: The optimizer.
        device: Tensors there are listed in `on_device` and only kept by reference: the device
            restores them.
        last: The state before the step before. It is used again as far as it is the same.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, last: "_HostState | None"
    ) -> None:
        self.optimizer, self.device = base_optimizer(optimizer), device
        self.on_device: list[Tensor] = []
        state, groups = self.optimizer.state, self.optimizer.param_groups
        self._values = [value for values in state.values() for value in values.values()]
        if last is not None and last.device_only and _same(self._values, last._values):
            self.state, self.on_device, self.device_only = last.state, list(self._values), True
        else:
            self.state = {key: self._copy(value) for key, value in state.items()}
            self.device_only = len(self.on_device) == len(self._values) and all(
                isinstance(value, Tensor) for value in self._values
            )
        # The learning rate is the schedule's, which has moved on when a step is reverted.
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
        self.optimizer.state.update({key: dict(value) for key, value in self.state.items()})
        for group, before in zip(self.optimizer.param_groups, self.groups, strict=True):
            for key in group.keys() - before.keys() - {"params", "lr"}:
                del group[key]
            group.update(before)
        vars(self.optimizer).update(self.numbers)
        for generator, before in self.generators:
            generator.setstate(before)


def _lacks_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether SGD has no momentum yet of a parameter that has a gradient.

    Its fused kernel would be left out on memory that nothing has been written to, and which it
    keeps as the momentum.
    """
    return isinstance(optimizer, torch.optim.SGD) and any(
        parameter.grad is not None
        and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        if group["momentum"]
        for parameter in group["params"]
    )


def _same(first: list[Any], second: list[Any]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself; timm's Lookahead wraps it."""
    return getattr(optimizer, "_base_optimizer", optimizer)
