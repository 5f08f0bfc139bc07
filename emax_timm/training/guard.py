"""Protect a run's weights from non-finite values, loss spikes and corrupt images, on all ranks."""

import math
import sys
from collections import deque
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .conditional import Refusal, as_integers
from .config import TrainConfig
from .data import sample_names
from .data.decoding import CorruptImageError
from .distributed import DistributedContext
from .grouping import grouping_buffers
from .verdict import Agreement, Report, Step, Verdict

__all__ = ["BadStepError", "Guard"]


class BadStepError(RuntimeError):
    """A step is refused for its loss or gradients; the weights are those of the last good step."""

    exit_code = 1


class Guard:
    """Decides whether a training step is made, and restores the model's buffers if it is not.

    Args:
        config: Its `nonfinite`, `loss_spike`, `on_spike` and `max_broken_fraction` are the policy.
        context: The distributed context; all of its ranks decide the same.
        model: The model, not compiled and not in DistributedDataParallel.
        loader: The training loader, which gives the names of samples.

    Attributes:
        recent: Losses of the last 100 steps, across epochs; a spike is far above their median.
        corrupt: Number of corrupt images in this epoch's steps so far, over all ranks.
        kept: By each of the model's buffers that a forward pass may change, its copy from before
            the step; `keep` overwrites the copies.
    """

    def __init__(
        self, config: TrainConfig, context: DistributedContext, model: nn.Module, loader: Any
    ) -> None:
        self.config, self.context, self.model, self.loader = config, context, model, loader
        self.recent: deque[float] = deque(maxlen=100)
        self.corrupt = 0
        # The schedule of the grouping is set by the host, and never by a forward pass.
        scheduled = set(grouping_buffers(model))
        own = [buffer for buffer in model.buffers() if buffer not in scheduled]
        copies = [buffer.clone() for buffer in own]
        self.kept = dict(zip(own, copies, strict=True))
        self._own, self._copies = as_integers(own), as_integers(copies)
        self._limits: tuple[list[float], Tensor] | None = None

    def keep(self) -> None:
        """Save the model's buffers before the forward passes of a step."""
        for dtype, own in self._own.items():
            torch._foreach_copy_(self._copies[dtype], own)

    def undo(self) -> None:
        """Restore the saved buffers, such as batch norm statistics, and drop the gradients."""
        for dtype, own in self._own.items():
            torch._foreach_copy_(own, self._copies[dtype])
        self.model.zero_grad()

    def undo_if(self, refused: Refusal | bool) -> None:
        """Undo if the step is refused; if the device knows that, it restores the buffers.

        Then `undo` is possible until the next `keep` only if the step was refused.
        """
        if isinstance(refused, Refusal):
            refused.put_back(self._own, self._copies)
        elif refused:
            self.undo()

    def ask(self, step: Step, report: Report) -> Verdict:
        """Combine the ranks' reports on a step, with one all-reduce; the host does not wait.

        All steps before must have been judged.
        """
        spike = self.context.size * self._spike()
        limits = self._limits_now(spike)
        if self._limits is None:
            device = torch.tensor(limits, dtype=torch.float64, device=self.context.device)
        else:
            before, device = self._limits
            for place, (old, new) in enumerate(zip(before, limits, strict=True)):
                if old != new:
                    device[place] = new
        self._limits = limits, device
        return Verdict(self.context, step, report, device, spike)

    def _limits_now(self, spike: float) -> list[float]:
        """Return what the values of a `Verdict` may be at most for a step to be made."""
        size, inf = self.context.size, math.inf
        losses, norms, signals = (
            [sys.float_info.max] * size,
            [sys.float_info.max] * size,
            [inf] * size,
        )
        corrupt = math.floor(self._allowed) - self.corrupt
        overflow = save = inf
        refused = spike if self.config.on_spike in ("skip", "stop") else inf
        return [*losses, *norms, *signals, corrupt, overflow, save, refused]

    def judge(self, verdict: Verdict) -> bool:
        """Return whether a step is made, and count it if so; report a bad one.

        Args:
            verdict: As `ask` has returned it for the step after the last one that was judged, or of
                the last one, for which the same is returned.

        Raises:
            BadStepError: On every rank, if the loss or a gradient of any rank is not finite or the
                loss is a spike, and the policy for that is to stop.
            CorruptImageError: On every rank, if this step brings the epoch's corrupt images above
                the allowed fraction.
        """
        if verdict.made is not None:
            return verdict.made
        agreed, step = verdict.agreement, verdict.step
        policy = self._policy(agreed)
        if too_many := self._too_many(step, self.corrupt + agreed.corrupt):
            raise CorruptImageError(too_many)
        if policy != "step":
            self._report(step, policy, agreed, verdict.loss)
        self.corrupt += agreed.corrupt
        verdict.made = policy != "skip"
        if verdict.made:
            self.recent.append(agreed.loss)
        return verdict.made

    def _policy(self, agreed: Agreement) -> str:
        """Return what is done with a step: step, warn (and step), skip or stop."""
        if agreed.bad:
            return self.config.nonfinite
        return self.config.on_spike if agreed.spike else "step"

    def _spike(self) -> float:
        """Return the mean loss above which the next step is a spike."""
        if not self.config.loss_spike or len(self.recent) < 10:
            return math.inf
        return self.config.loss_spike * median(self.recent)

    @property
    def _allowed(self) -> float:
        """The number of images of an epoch that may be corrupt."""
        return self.config.max_broken_fraction * len(self.loader.dataset)

    def _too_many(self, step: Step, corrupt: int) -> str:
        """Return an error message if the epoch has too many corrupt images, else an empty one."""
        if corrupt <= self._allowed:
            return ""
        fraction = self.config.max_broken_fraction
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
        if self.context.rank in agreed.bad or loss.item() > self._spike():
            names = [name for batch in step.batches for name in sample_names(self.loader, batch)]
            text = f"samples at {step} on rank {self.context.rank}: {_list(names)}"
            print(text, file=sys.stderr, flush=True)
        if policy == "stop":
            raise BadStepError(f"{problem}; {hint}")
        self.context.warn(f"{problem}{': the step is left out' if policy == 'skip' else ''}")


def _list(items: list[Any]) -> str:
    return ", ".join(map(str, items))
