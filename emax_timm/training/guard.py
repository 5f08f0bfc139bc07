"""What keeps bad numbers and corrupt images out of a run's weights, on every rank alike."""

import sys
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data import sample_names
from .data.decoding import BrokenImageError
from .distributed import World

__all__ = ["Agreement", "BadStepError", "Guard", "Step", "agree"]


class BadStepError(RuntimeError):
    """A step was not to be made; the weights are those of the last good one."""

    exit_code = 1


class Step(NamedTuple):
    """A training step's place in the run, and the batches of its epoch that it takes."""

    number: int
    epoch: int
    batches: range

    def __str__(self) -> str:
        return f"step {self.number + 1} of epoch {self.epoch + 1}"


class Agreement(NamedTuple):
    """What every rank knows of a step before it is made."""

    loss: float
    """The mean over the ranks."""
    broken: int
    """Corrupt images in the batches of all ranks."""
    bad: list[int]
    """The ranks whose loss or gradients are not finite."""
    signal: int
    """The number of a signal that asks the run to stop, else 0."""


def agree(world: World, loss: Tensor, norm: Tensor | None, broken: int, signal: int) -> Agreement:
    """Put the ranks' parts in a step together.

    The one synchronisation point of a step. (With float16 torch's scaler has its own: it reads
    whether it has to skip the step.)

    Args:
        world: The ranks.
        loss: This rank's, [].
        norm: That of its gradients, []; None leaves them unchecked.
        broken: Corrupt images in its batches.
        signal: The number of a signal that it has had, else 0.
    """
    flag = 2 * ~loss.isfinite()
    if norm is not None:
        flag = flag + ~norm.isfinite()
    size = world.size
    values = torch.zeros(2 + 2 * size, dtype=torch.float64, device=world.device)
    values[0] = loss
    values[1] = broken
    values[2 + world.rank] = flag
    values[2 + size + world.rank] = signal
    # Here the host waits for the device.
    total, all_broken, *of_ranks = world.sum(values).tolist()
    flags, signals = of_ranks[:size], of_ranks[size:]
    # A gradient is that of all ranks, so a rank whose loss is not finite spoils it for all.
    worst = max(flags)
    bad = [rank for rank, flag in enumerate(flags) if flag == worst > 0]
    return Agreement(total / size, int(all_broken), bad, int(max(signals)))


class Guard:
    """Decides what becomes of each step, and undoes one that is not to be made.

    Args:
        config: Its `nonfinite`, `loss_spike`, `on_spike` and `max_broken_fraction` are the policy.
        world: The ranks, which all decide the same.
        model: The bare model.
        loader: The training loader, which names samples.

    Attributes:
        recent: Losses of the last steps, across epochs; a spike is one against their median.
        broken: Corrupt images in the steps of this epoch, over all ranks.
    """

    def __init__(self, config: TrainConfig, world: World, model: nn.Module, loader: Any) -> None:
        self.config, self.world, self.model, self.loader = config, world, model, loader
        self.recent: deque[float] = deque(maxlen=100)
        self.broken = 0
        # What a forward pass changes, and where it is kept until the gradients are known to be
        # finite; copied by dtype, in a kernel or two instead of one for each buffer.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            groups.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(own, [buffer.clone() for buffer in own]) for own in groups.values()]

    def keep(self) -> None:
        """Keep the model's buffers, before the forward passes of a step."""
        for own, kept in self._buffers:
            torch._foreach_copy_(kept, own)

    def undo(self) -> None:
        """Put back the buffers that were kept, such as batch norm statistics; drop gradients."""
        for own, kept in self._buffers:
            torch._foreach_copy_(own, kept)
        self.model.zero_grad()

    def judge(self, step: Step, loss: Tensor, agreed: Agreement) -> bool:
        """Whether a step is to be made; a bad one is reported, and undone if it is not.

        Args:
            step: Its place in the run.
            loss: This rank's, which tells whether its samples are named.
            agreed: What all ranks know.

        Raises:
            BadStepError: On every rank, if the loss or a gradient of any is not finite, or if the
                loss is a spike, and the policy for that is to stop.
            BrokenImageError: On every rank, if the step makes the corrupt images of the epoch more
                than may be.
        """
        policy = self._policy(agreed)
        too_many = self._too_many(step, self.broken + agreed.broken)
        if policy in ("skip", "stop") or too_many:
            self.undo()
        if too_many:
            raise BrokenImageError(too_many)
        if policy != "step":
            self._report(step, policy, agreed, loss)
        self.broken += agreed.broken
        if policy == "skip":
            return False
        self.recent.append(agreed.loss)
        return True

    def _policy(self, agreed: Agreement) -> str:
        """What becomes of a step: step, warn (and step), skip or stop."""
        if agreed.bad:
            return self.config.nonfinite
        return self.config.on_spike if self._is_spike(agreed.loss) else "step"

    def _is_spike(self, loss: float) -> bool:
        if not self.config.loss_spike or len(self.recent) < 10:
            return False
        return loss > self.config.loss_spike * median(self.recent)

    def _too_many(self, step: Step, broken: int) -> str:
        """What is wrong if the epoch has so many corrupt images, empty if that may be."""
        fraction = self.config.max_broken_fraction
        if not broken or broken <= fraction * len(self.loader.dataset):
            return ""
        return (
            f"{broken} of {len(self.loader.dataset)} training images are broken by {step}, "
            f"more than --max-broken-fraction {fraction}"
        )

    def _report(self, step: Step, policy: str, agreed: Agreement, loss: Tensor) -> None:
        """Say what is wrong with a step, and on the ranks to blame in which samples."""
        problem, hint = f"the loss is a spike at {step}", "lower --lr, or choose another --on-spike"
        if agreed.bad:
            problem = f"the loss or a gradient is not finite at {step} on rank {_list(agreed.bad)}"
            hint = (
                "lower --lr, clip with --clip-grad, or leave such steps out with --nonfinite skip"
            )
        if self.world.rank in agreed.bad or self._is_spike(loss.item()):
            names = [name for batch in step.batches for name in sample_names(self.loader, batch)]
            text = f"samples at {step} on rank {self.world.rank}: {_list(names)}"
            print(text, file=sys.stderr, flush=True)
        if policy == "stop":
            raise BadStepError(f"{problem}; {hint}")
        self.world.warn(f"{problem}{': the step is left out' if policy == 'skip' else ''}")


def _list(items: list[Any]) -> str:
    return ", ".join(map(str, items))
