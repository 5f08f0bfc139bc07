"""Whether a training step is made: what the ranks say about it, on the device and on the host."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import DistributedContext

__all__ = ["Agreement", "Report", "Step", "Verdict"]


class Step(NamedTuple):
    """A training step: its number in the run, its epoch, and the epoch's batches that it uses."""

    number: int
    epoch: int
    batches: range

    def __str__(self) -> str:
        return f"step {self.number + 1} of epoch {self.epoch + 1}"


class Agreement(NamedTuple):
    """The facts about a step that all ranks share."""

    loss: float
    """Mean loss over the ranks."""
    corrupt: int
    """Number of corrupt images in the batches of all ranks."""
    bad: list[int]
    """Ranks whose loss is not finite; if there are none, those with non-finite gradients."""
    signal: int
    """Number of a signal that asks the run to stop, else 0."""
    save: bool
    """Whether a rank asks for a checkpoint."""
    overflow: bool
    """Whether the gradient scaler leaves the step out."""
    spike: bool
    """Whether the loss is a spike."""


class Report(NamedTuple):
    """What one rank has to say about a step; tensors are on the device and not read."""

    loss: Tensor
    """The loss, []."""
    norm: Tensor | None
    """The norm of the gradients, []; None leaves them unchecked."""
    overflow: Tensor | None = None
    """Whether the gradient scaler leaves the step out, []."""
    corrupt: int = 0
    """Number of corrupt images in the batches."""
    signal: int = 0
    """Number of a signal that this rank has received, else 0."""
    save: bool = False
    """Whether this rank asks for a checkpoint."""


class Verdict:
    """Whether a step is made: known to the device, and to the host once it asks.

    Args:
        context: The distributed context.
        step: The step's place in the run.
        report: What this rank has to say about it.
        limits: Of the ranks' reports together, on the device, as `Guard` makes them; a value above
            its limit, or one that is not a number, refuses the step.
        spike: Sum of the ranks' losses above which they are a spike.

    Attributes:
        refused: Whether the step is left out, bool [] on the device, the same on all ranks.
        made: The contrary, once the host has judged the step.
    """

    def __init__(
        self, context: DistributedContext, step: Step, report: Report, limits: Tensor, spike: float
    ) -> None:
        self.step, self.loss, self.size, self.spike = step, report.loss, context.size, spike
        self.made: bool | None = None
        self._agreement: Agreement | None = None
        # Each rank has its own places for its loss, the norm and the signal; the others are sums.
        values = torch.zeros_like(limits)
        values[context.rank] = report.loss
        if report.norm is not None:
            values[context.size + context.rank] = report.norm
        if report.overflow is not None:
            values[-3] = report.overflow
        rest = {2 * context.size + context.rank: report.signal, -4: report.corrupt, -2: report.save}
        for place, value in rest.items():
            if value:
                values[place] = value
        context.sum(values)
        if math.isfinite(spike):
            values[-1] = values[: context.size].sum().clamp(min=0)
        self.refused = (values.abs() <= limits).all().logical_not()
        self._values, self._arrived = _to_host(values)

    @property
    def agreement(self) -> Agreement:
        """What all ranks know about the step; the host waits for it if it has not come yet."""
        if self._agreement is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._agreement = self._read(self._values.tolist())
        return self._agreement

    def _read(self, values: list[float]) -> Agreement:
        size = self.size
        losses, norms, signals = (values[n * size : (n + 1) * size] for n in range(3))
        corrupt, overflow, save, spike = values[-4:]
        # Gradients are averaged over the ranks, so a loss that is not finite spoils those of all
        # ranks; only the ranks with such a loss are to blame.
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        bad = bad or [rank for rank, norm in enumerate(norms) if not math.isfinite(norm)]
        return Agreement(
            loss=sum(losses) / size,
            corrupt=int(corrupt),
            bad=bad,
            signal=int(max(signals)),
            save=save > 0,
            overflow=overflow > 0,
            spike=spike > self.spike,
        )


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start to copy a tensor to the host; returns the copy, and the event that it has arrived."""
    cuda = values.device.type == "cuda"
    copy = torch.empty_like(values, device="cpu", pin_memory=cuda)
    copy.copy_(values, non_blocking=cuda or values.device.type == "cpu")
    if not cuda:
        return copy, None
    # The host sleeps until the event, so that it does not take the core of a worker.
    arrived = torch.cuda.Event(blocking=True)
    arrived.record(torch.cuda.current_stream(values.device))
    return copy, arrived
