"""Protect a run's weights from non-finite values, loss spikes and corrupt images, on all ranks."""

import sys
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .data import sample_names
from .data.decoding import CorruptImageError
from .distributed import DistributedContext

__all__ = ["Agreement", "BadStepError", "Guard", "Step", "agree"]


class BadStepError(RuntimeError):
    """A step is refused for its loss or gradients; the weights are those of the last good step."""

    exit_code = 1


class Step(NamedTuple):
    """A training step: its number in the run, its epoch, and the epoch's batches that it uses."""

    number: int
    epoch: int
    batches: range

    def __str__(self) -> str:
        return f"step {self.number + 1} of epoch {self.epoch + 1}"


class Agreement(NamedTuple):
    """The facts about a step that all ranks share before it is made."""

    loss: float
    """Mean loss over the ranks."""
    corrupt: int
    """Number of corrupt images in the batches of all ranks."""
    bad: list[int]
    """Ranks whose loss is not finite; if there are none, those with non-finite gradients."""
    signal: int
    """Number of a signal that asks the run to stop, else 0."""


def agree(
    context: DistributedContext, loss: Tensor, norm: Tensor | None, corrupt: int, signal: int
) -> Agreement:
    """Combine the ranks' results of a step, with one all-reduce.

    This is the only synchronisation point of a step. (With float16, torch's gradient scaler adds
    one: it reads whether it has to skip the step.)

    Args:
        context: The distributed context.
        loss: The loss on this rank, [].
        norm: The norm of the gradients, []; None leaves them unchecked.
        corrupt: Number of corrupt images in this rank's batches.
        signal: Number of a signal that this rank has received, else 0.
    """
    flag = 2 * ~loss.isfinite()
    if norm is not None:
        flag = flag + ~norm.isfinite()
    size = context.size
    values = torch.zeros(2 + 2 * size, dtype=torch.float64, device=context.device)
    values[0] = loss
    values[1] = corrupt
    values[2 + context.rank] = flag
    values[2 + size + context.rank] = signal
    # Here the host waits for the device.
    total, all_corrupt, *of_ranks = context.sum(values).tolist()
    flags, signals = of_ranks[:size], of_ranks[size:]
    # Gradients are averaged over the ranks, so a loss that is not finite spoils those of all ranks;
    # only the ranks with such a loss are to blame.
    worst = max(flags)
    bad = [rank for rank, flag in enumerate(flags) if flag == worst > 0]
    return Agreement(total / size, int(all_corrupt), bad, int(max(signals)))


class Guard:
    """Decides whether a training step is made, and restores the model if it is not.

    Args:
        config: Its `nonfinite`, `loss_spike`, `on_spike` and `max_broken_fraction` are the policy.
        context: The distributed context; all of its ranks decide the same.
        model: The model, not compiled and not in DistributedDataParallel.
        loader: The training loader, which gives the names of samples.

    Attributes:
        recent: Losses of the last 100 steps, across epochs; a spike is far above their median.
        corrupt: Number of corrupt images in this epoch's steps so far, over all ranks.
    """

    def __init__(
        self, config: TrainConfig, context: DistributedContext, model: nn.Module, loader: Any
    ) -> None:
        self.config, self.context, self.model, self.loader = config, context, model, loader
        self.recent: deque[float] = deque(maxlen=100)
        self.corrupt = 0
        # A forward pass changes the buffers; copies are kept until the gradients are known to be
        # finite. Grouped by dtype they are copied in a kernel or two, not in one for each buffer.
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            groups.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(own, [buffer.clone() for buffer in own]) for own in groups.values()]

    def keep(self) -> None:
        """Save the model's buffers before the forward passes of a step."""
        for own, kept in self._buffers:
            torch._foreach_copy_(kept, own)

    def undo(self) -> None:
        """Restore the saved buffers, such as batch norm statistics, and drop the gradients."""
        for own, kept in self._buffers:
            torch._foreach_copy_(own, kept)
        self.model.zero_grad()

    def judge(self, step: Step, loss: Tensor, agreed: Agreement) -> bool:
        """Return whether the step is to be made; report a bad one, and undo it if it is not made.

        Args:
            step: The step's place in the run.
            loss: The loss on this rank, [], which decides whether its samples are named.
            agreed: What all ranks know about the step.

        Raises:
            BadStepError: On every rank, if the loss or a gradient of any rank is not finite or the
                loss is a spike, and the policy for that is to stop.
            CorruptImageError: On every rank, if this step brings the epoch's corrupt images above
                the allowed fraction.
        """
        policy = self._policy(agreed)
        too_many = self._too_many(step, self.corrupt + agreed.corrupt)
        if policy in ("skip", "stop") or too_many:
            self.undo()
        if too_many:
            raise CorruptImageError(too_many)
        if policy != "step":
            self._report(step, policy, agreed, loss)
        self.corrupt += agreed.corrupt
        if policy == "skip":
            return False
        self.recent.append(agreed.loss)
        return True

    def _policy(self, agreed: Agreement) -> str:
        """Return what is done with a step: step, warn (and step), skip or stop."""
        if agreed.bad:
            return self.config.nonfinite
        return self.config.on_spike if self._is_spike(agreed.loss) else "step"

    def _is_spike(self, loss: float) -> bool:
        if not self.config.loss_spike or len(self.recent) < 10:
            return False
        return loss > self.config.loss_spike * median(self.recent)

    def _too_many(self, step: Step, corrupt: int) -> str:
        """Return an error message if the epoch has too many corrupt images, else an empty one."""
        fraction = self.config.max_broken_fraction
        if not corrupt or corrupt <= fraction * len(self.loader.dataset):
            return ""
        return (
            f"{corrupt} of {len(self.loader.dataset)} training images are corrupt by {step}, "
            f"more than --max-broken-fraction {fraction}"
        )

    def _report(self, step: Step, policy: str, agreed: Agreement, loss: Tensor) -> None:
        """Report what is wrong with a step; the ranks at fault also name its samples.

        Raises:
            BadStepError: If the policy is to stop.
        """
        problem, hint = f"the loss is a spike at {step}", "lower --lr, or choose another --on-spike"
        if agreed.bad:
            problem = f"the loss or a gradient is not finite at {step} on rank {_list(agreed.bad)}"
            hint = (
                "lower --lr, clip with --clip-grad, or leave such steps out with --nonfinite skip"
            )
        if self.context.rank in agreed.bad or self._is_spike(loss.item()):
            names = [name for batch in step.batches for name in sample_names(self.loader, batch)]
            text = f"samples at {step} on rank {self.context.rank}: {_list(names)}"
            print(text, file=sys.stderr, flush=True)
        if policy == "stop":
            raise BadStepError(f"{problem}; {hint}")
        self.context.warn(f"{problem}{': the step is left out' if policy == 'skip' else ''}")


def _list(items: list[Any]) -> str:
    return ", ".join(map(str, items))
