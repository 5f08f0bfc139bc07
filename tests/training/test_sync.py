"""What a training step waits for: on a GPU, only for the step before, which is done by then.

On a CPU, where it makes no difference, it waits for the step itself, once: where the ranks agree.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gpu_semantics import one_hot_as_on_a_gpu
from tiers import mostly_slow
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_testing import MakeTrainer

from emax_timm import EMAX
from emax_timm.training import TrainConfig
from emax_timm.training.build import build_trainer
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.grouping import GroupingSchedule
from emax_timm.training.trainer import Trainer

# What makes the host wait for values on a GPU. Reading a whole tensor on the CPU runs no operator,
# so the methods are counted too.
OPERATORS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"),
}
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class Waits(TorchDispatchMode):
    """The names of the operators that make the host wait, as they run.

    Also the places of copies to the host that it does not wait for, and in which step each began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.step, self.copies = 0, {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::")
        if name in OPERATORS:
            self.seen.append(name)
        if name == "copy_" and len(args) == 3 and args[2]:
            self.copies[args[0].data_ptr()] = self.step
        if name.startswith("index.") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.seen.append("index by a mask")
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """The names of the methods that copy a whole tensor to the host, as they are called.

    A copy that has begun in the step before is there by now.
    """

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in METHODS:
            begun = self.waits.copies.get(args[0].data_ptr(), self.waits.step)
            late = "of the step before" if begun == self.waits.step - 1 else ""
            self.seen.append(f"{func.__name__} {late}".strip())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _one_hot_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    one_hot_as_on_a_gpu(monkeypatch)


def waits_of(trainer: Trainer, steps: int = 2) -> list[str]:
    """What the host waits for in so many steps, after the first ones of the process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (8,), generator=generator)
    trainer.network.train()
    trainer.train_step([(images, labels)])  # builds the optimizer's state
    with Waits() as waits, Reads(waits) as reads:
        if trainer.asynchronous:
            trainer.train_step([(images, labels)])  # the first that the host does not wait for
            assert reads.seen + waits.seen == []
        for _ in range(steps):
            waits.step += 1
            trainer.train_step([(images, labels)])
    return reads.seen + waits.seen


# Not Adam, which on a CPU reads its own counters of steps; these are on the host on a GPU too.
EVERYTHING: dict[str, Any] = {
    **{"mixup": 0.4, "cutmix": 1.0, "no_prefetcher": True, "drop": 0.1, "drop_path": 0.1},
    **{"clip_grad": 1.0, "model_ema": True, "model_ema_warmup": True, "sched_on_updates": True},
}


@pytest.mark.parametrize("clip_mode", mostly_slow(["norm", "value", "agc"], 0))
@pytest.mark.parametrize("amp", [False, True])
def test_train_step_waits_once(trainer_for: MakeTrainer, amp: bool, clip_mode: str) -> None:
    options = {**EVERYTHING, "amp": amp, "amp_dtype": "bfloat16", "clip_mode": clip_mode}
    assert waits_of(trainer_for(**options)) == ["tolist"] * 2


@pytest.mark.parametrize(
    "options",
    mostly_slow(
        [
            {"opt": "sgd"},
            {"opt": "sgd", "opt_kwargs": {"fused": True}},
            {"opt": "adamw", "opt_kwargs": {"fused": True}},
            {"opt": "sgd", "amp": True, "amp_dtype": "float16"},
            {"opt": "lion", "clip_mode": "agc"},
            {"opt": "sgd", "loss_spike": 20.0, "on_spike": "skip", "grad_accum_steps": 2},
        ],
        1,
    ),
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_step_of_a_gpu_waits_for_the_step_before_alone(
    trainer_for: MakeTrainer, options: dict[str, Any]
) -> None:
    trainer = trainer_for(**EVERYTHING, **options, epochs=9)
    trainer.asynchronous = True
    assert waits_of(trainer, steps=12) == ["tolist of the step before"] * 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "muon"])
@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_gpu_itself_sees_no_wait(images: Path, tmp_path: Path, opt: str, amp_dtype: str) -> None:
    options = {"data_dir": str(images), "output": str(tmp_path), "opt": opt, **EVERYTHING}
    options |= {"model": "resnet10t_emax", "img_size": 32, "batch_size": 8, "workers": 0}
    config = TrainConfig(**options, amp=True, amp_dtype=amp_dtype)
    trainer = build_trainer(config, DistributedContext(torch.device("cuda")))
    batch = torch.randn(8, 3, 32, 32).cuda(), torch.randint(2, (8,)).cuda()
    trainer.network.train()
    for _ in range(3):
        trainer.train_step([(batch[0].clone(), batch[1])])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step([(batch[0].clone(), batch[1])])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert len(trainer.losses) == 6


def test_layers_of_the_grouping_are_set_at_once_and_only_to_other_values() -> None:
    model = timm.create_model("resnet10t_emax")
    layers = sum(isinstance(module, EMAX) for module in model.modules())
    config = TrainConfig(grouping_warmup=[0.0, 0.5], grouping_temperature=[1.0, 1.0])
    schedule, calls = GroupingSchedule(model, 8, config), Calls()
    with calls:
        for step in range(8):
            schedule.set(step)
    assert layers > 2
    # The warm-up is over with step 4, and the temperature is constant.
    assert calls.seen == ["_foreach_zero_", "_foreach_add_.ScalarList"] * 5


class Calls(TorchDispatchMode):
    """The names of all operators, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    mostly_slow(
        [
            lambda loss: loss.item(),
            lambda loss: loss > 0 and None,
            lambda loss: loss[None][loss[None] > 0],
            lambda loss: loss.detach().cpu(),
            lambda loss: loss.detach().numpy(),
            lambda loss: torch.nonzero(loss),
            lambda loss: torch.equal(loss, loss),
        ],
        *(0, 2, 3),
    ),
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
