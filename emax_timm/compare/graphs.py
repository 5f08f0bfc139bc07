"""The forward and backward passes of a training step as a CUDA graph.

A small network's kernels take a GPU less time than the host takes to launch them. A graph is
launched as a whole, and computes what the launches one by one would have computed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..training.trainer import Batch, Trainer

__all__ = ["GraphedPasses", "graphed_passes", "with_own_generator"]

WARM_UP = 3  # steps before the capture, in which kernels are compiled and libraries choose theirs


@contextlib.contextmanager
def graphed_passes(trainer: Trainer) -> Iterator[None]:
    """On a GPU, train on a stream of its own within the context, and by a graph where that can be.

    It cannot where the batches are mixed in the step itself, by random numbers of the host, where
    the model is compiled, which has its own way to graphs, or distributed, nor where activations
    are computed anew, which reads the state of the generators.
    """
    device = trainer.context.device
    if device.type != "cuda":
        yield
        return
    same = trainer.mixup is None and not trainer.config.grad_checkpointing
    if same and trainer.network is trainer.model:
        trainer.backward = GraphedPasses(trainer, _capture)
    with torch.cuda.device(device):
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)


def with_own_generator(hand_over: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Let the others have a turn with generators of the GPU of their own.

    A graph reads seed and offset from the GPU when it runs, and there they are part of a
    generator's state: that of a run whose turn is next must not be written over one that is read.
    """
    if device.type != "cuda":
        return hand_over
    with torch.cuda.device(device):
        default = torch.cuda.default_generators[torch.cuda.current_device()]
    own = default.clone_state()
    default.graphsafe_set_state(own)

    def hand_over_and_restore() -> None:
        hand_over()
        default.graphsafe_set_state(own)

    return hand_over_and_restore


class Graph(NamedTuple):
    """What has been captured: `replay` computes the loss and the gradients from the batches."""

    batches: list[Batch]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]
    replay: Callable[[], None]


class GraphedPasses:
    """Computes the gradients of a step as `Trainer.backward` does, from the fourth step by a graph.

    Args:
        trainer: The trainer.
        capture: Captures what a function computes, and returns a function that computes it anew,
            from and into the same tensors. Nothing has been computed before it is called.
    """

    def __init__(
        self, trainer: Trainer, capture: Callable[[Callable[[], None]], Callable[[], None]]
    ) -> None:
        self.trainer, self.capture, self.passes = trainer, capture, trainer.backward
        self.steps = 0
        self.shapes: list[list[torch.Size]] = []  # of the first step's batches
        self.graph: Graph | None = None

    def __call__(self, batches: list[Batch]) -> Tensor:
        """Leave the gradients of the mean loss of `batches` in the parameters; returns it, []."""
        self.steps += 1
        self.shapes = self.shapes or _shapes(batches)
        # An epoch's last batches may be fewer.
        if self.steps <= WARM_UP or _shapes(batches) != self.shapes:
            return self.passes(batches)
        if self.graph is None:
            self.graph = self._graph(batches)
        for own, batch in zip(self.graph.batches, batches, strict=True):
            for mine, given in zip(own, batch, strict=True):
                mine.copy_(given, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in self.graph.gradients:
            parameter.grad = gradient
        return self.graph.loss.clone()  # it is read after the next replay, too

    def _graph(self, batches: list[Batch]) -> Graph:
        device = self.trainer.context.device
        copies = [(x.to(device, copy=True), y.to(device, copy=True)) for x, y in batches]
        losses = []
        replay = self.capture(lambda: losses.append(self.passes(copies)))
        found = [(p, p.grad) for p in self.trainer.model.parameters() if p.grad is not None]
        return Graph(copies, losses[0], found, replay)


def _shapes(batches: list[Batch]) -> list[list[torch.Size]]:
    return [[tensor.shape for tensor in batch] for batch in batches]


def _capture(function: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # The threads of data loaders may use the GPU meanwhile.
    stream, mode = torch.cuda.current_stream(), "thread_local"
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        function()
    return graph.replay
