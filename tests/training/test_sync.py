"""A training step waits for the device once: where the ranks agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_testing import MakeTrainer

from emax_timm.training.trainer import Trainer

# What makes the host wait for values on a GPU. Reading a whole tensor on the CPU runs no operator,
# so the methods are counted too.
OPERATORS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"),
}
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class Waits(TorchDispatchMode):
    """The names of the operators that make the host wait, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::")
        if name in OPERATORS:
            self.seen.append(name)
        if name.startswith("index.") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.seen.append("index by a mask")
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """The names of the methods that copy a whole tensor to the host, as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in METHODS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _one_hot_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU alone torch's one_hot reads the least and the greatest class, to check them.
    def one_hot(index: Tensor, classes: int) -> Tensor:
        zeros = torch.zeros(*index.shape, classes, dtype=torch.int64, device=index.device)
        return zeros.scatter_(-1, index[..., None], 1)

    monkeypatch.setattr(F, "one_hot", one_hot)


def waits_of(trainer: Trainer, steps: int = 2) -> list[str]:
    """What the host waits for in so many steps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (8,), generator=generator)
    trainer.network.train()
    trainer.train_step([(images, labels)])  # builds the optimizer's state
    with Waits() as waits, Reads() as reads:
        for _ in range(steps):
            trainer.train_step([(images, labels)])
    return reads.seen + waits.seen


# Not Adam, which on a CPU reads its own counters of steps; these are on the host on a GPU too.
EVERYTHING: dict[str, Any] = {
    **{"mixup": 0.4, "cutmix": 1.0, "no_prefetcher": True, "drop": 0.1, "drop_path": 0.1},
    **{"clip_grad": 1.0, "model_ema": True, "model_ema_warmup": True, "sched_on_updates": True},
}


@pytest.mark.parametrize("clip_mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("amp", [False, True])
def test_train_step_waits_once(trainer_for: MakeTrainer, amp: bool, clip_mode: str) -> None:
    options = {**EVERYTHING, "amp": amp, "amp_dtype": "bfloat16", "clip_mode": clip_mode}
    assert waits_of(trainer_for(**options)) == ["tolist"] * 2


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.item(),
        lambda loss: loss > 0 and None,
        lambda loss: loss[None][loss[None] > 0],
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.detach().numpy(),
        lambda loss: torch.nonzero(loss),
        lambda loss: torch.equal(loss, loss),
    ],
    ids=["item", "bool", "mask", "cpu", "numpy", "nonzero", "equal"],
)
def test_waits_of_a_loss_that_is_read_are_counted(
    trainer_for: MakeTrainer, read: Callable[[Tensor], Any]
) -> None:
    class Read(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            loss = super().forward(input, target)
            read(loss)
            return loss

    trainer = trainer_for()
    trainer.criterion = Read()
    assert len(waits_of(trainer)) >= 4
